"""The model of a job: loaded with the head that its task needs, converted, perhaps wrapped by PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import set_seed

from hf_glu.config_file import check_config, reading
from hf_glu.conversion import Report, convert, plan
from hf_glu.errors import OptionError
from hf_glu.hub import resolve
from hf_glu.layers.forward import projections
from hf_glu.layers.sites import find_sites
from hf_glu.probe import give_pad_token
from hf_glu.tasks.table import Task
from hf_glu.training.features import is_text_to_text
from hf_glu.training.options import JobOptions

# form -> outputs of a classifier; None: one for each label
HEADS = {"classes": None, "regression": 1, "choice": 1, "entity": 2}


def load_for_task(source: str, task: Task, *, form: str = "auto", seed: int = 0) -> tuple[Any, Any, bool]:
    """Return a model for ``task`` with its tokenizer, and whether it is text-to-text.

    A classifier's fresh head is the same for the same seed. Weights are in float32.

    Raises:
        CheckpointError: the checkpoint can't be found or loaded.
        OptionError: the model has no such form.
    """
    import transformers

    folder = resolve(source)
    check_config(folder)
    with reading(source, why=f"can't be loaded for {task.name}"):
        config = transformers.AutoConfig.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        text = is_text_to_text(config, form)
        kind = transformers.AutoModelForSeq2SeqLM if text else transformers.AutoModelForSequenceClassification
        set_seed(seed)
        model = kind.from_pretrained(folder, dtype=torch.float32, **({} if text else _head(task)))
    give_padding(model, tokenizer)
    return model, tokenizer, text


def _head(task: Task) -> dict[str, Any]:
    count = HEADS[task.form] or len(task.labels)
    names = dict(enumerate(task.labels)) if count == len(task.labels) else {i: f"LABEL_{i}" for i in range(count)}
    kind = {"regression": "regression", "choice": None}.get(task.form, "single_label_classification")
    label2id = {name: number for number, name in names.items()}
    return {"num_labels": count, "id2label": names, "label2id": label2id, "problem_type": kind}


def give_padding(model: Any, tokenizer: Any) -> None:
    """Give tokenizer and model a padding token: GPT-2 has none, and takes the one that ends a text.

    Raises:
        OptionError: the tokenizer has neither.
    """
    give_pad_token(tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise OptionError("the tokenizer has no token to pad with: set tokenizer.pad_token and save it")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def convert_for(model: Any, job: JobOptions, texts: Callable[[], list[str]], tokenizer: Any) -> Report | None:
    """Convert the model as a job asks for; where that needs a fit, on what ``texts`` gives.

    Raises:
        HfGluError: as `hf_glu.convert`.
    """
    if not job.to:
        return None
    choice: dict[str, Any] = {"width": job.units, "layers": job.layers, "exclude": job.exclude}
    if job.experts:
        shape = {"layers": job.layers, "exclude": job.exclude, "experts": job.experts, "top_k": job.top_k}
        return convert(model, job.to, **shape)  # type: ignore[arg-type]
    if job.random:
        return _random(model, job, choice)
    fitted = plan(model, job.to, fitted=True, **choice).needs_calibration
    return convert(model, job.to, calibration=texts() if fitted else None, tokenizer=tokenizer, **choice)


def _random(model: Any, job: JobOptions, choice: dict[str, Any]) -> Report:
    """Convert by shape only: the family's own initialisation in all projections of the converted FFNs."""
    assert job.to
    texts = torch.randint(0, model.config.vocab_size, (4, 16))
    narrow = job.width != "keep"
    report = convert(model, job.to, check=False, distill_steps=0, calibration=texts if narrow else None, **choice)
    names = {step.site.name for step in report.plan.steps if step.changes}
    modules: list[Any] = [part for site in find_sites(model) if site.name in names for part in projections(site)]
    for module in modules:
        module._is_hf_initialized = False
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = False
        model._init_weights(module)
    return report
