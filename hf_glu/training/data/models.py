"""Loading the model of a job with the head that its task needs, and converting it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from hf_glu.checkpoint.config_file import check_config, reading
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.loading import forget_code
from hf_glu.compat.of_models import INIT_WEIGHTS, INITIALIZED
from hf_glu.config.traits import text_config, token_id, vocabulary
from hf_glu.conversion import Report, convert, plan
from hf_glu.errors import CheckpointError, OptionError
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.experts.group import banks_of
from hf_glu.ffn.experts.native import UNGATED
from hf_glu.ffn.forward import is_alone, projections
from hf_glu.ffn.sites import find_sites
from hf_glu.instruments.probe import CHARACTERS, give_pad_token
from hf_glu.tasks.table import Task
from hf_glu.training.data.features import is_text_to_text
from hf_glu.training.data.heads import auto_class, load_classifier
from hf_glu.training.data.pairs import settle_generation
from hf_glu.training.options import ModelOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SiteChoice(TypedDict):
    """Which FFNs a conversion changes, and how wide they become, as `hf_glu.convert` takes it."""

    width: int | str
    layers: str | None
    exclude: str | None


def load_for_task(
    source: str, task: Task, *, form: str = "auto", seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """Load a model for ``task`` and its tokenizer; return them, and whether the model is text-to-text.

    A classifier's new head is the same for the same seed. Weights are in float32.

    Raises:
        CheckpointError: the checkpoint can't be found or loaded.
        OptionError: the model has no such form.
    """
    import transformers

    folder = resolve(source)
    check_config(folder)
    with reading(source, why=f"can't be loaded for {task.name}"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        text = is_text_to_text(config, form, task)
        set_seed(seed)
        if text:
            kind = getattr(transformers, auto_class(task, text=True, joined=not config.is_encoder_decoder))
            model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            if missing := sorted(info["missing_keys"]):
                raise CheckpointError(f"{source} lacks weights of {type(model).__name__}, such as {missing[0]}")
        else:
            model = load_classifier(folder, config, task)
    forget_code(model.config)
    give_padding(model, tokenizer)
    if text and not config.is_encoder_decoder:
        settle_generation(model, tokenizer)
    return model, tokenizer, text


def give_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a padding token if it has none (GPT-2's ends a text), and the model the tokenizer's.

    By it a decoder's head finds a text's last token, which is another's padding where the two differ.

    Raises:
        OptionError: the tokenizer has neither.
    """
    give_pad_token(tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise OptionError("the tokenizer has no token to pad with: set tokenizer.pad_token and save it")
    if token_id(model.config, "pad_token_id") != tokenizer.pad_token_id:
        for config in (model.config, text_config(model.config)):  # heads read the one or the other
            config.pad_token_id = tokenizer.pad_token_id


def convert_for(
    model: PreTrainedModel, job: ModelOptions, texts: Callable[[], list[str]], tokenizer: PreTrainedTokenizerBase
) -> Report | None:
    """Convert the model as a job asks for; a conversion that needs a fit is fitted on ``texts()``.

    Raises:
        HfGluError: as `hf_glu.convert`.
    """
    if not job.conversion:
        return None
    choice: SiteChoice = {"width": job.units, "layers": job.layers, "exclude": job.exclude}
    if job.experts:
        fitted = job.width != "keep" or UNGATED in job.experts
        fit = {"calibration": texts(), "tokenizer": tokenizer, "distill_steps": job.distill_steps} if fitted else {}
        sites = [site for site in find_sites(model) if is_alone(site)] if job.random else []
        spread = {site.name: [part.weight.std() for part in projections(site)] for site in sites}
        report = convert(model, job.to, experts=job.experts, top_k=job.top_k, **choice, **fit)
        if job.random:
            _part_experts(model, [spread[step.site.name] for step in report.plan.steps if step.site.name in spread])
        return report
    assert job.to
    if job.random:
        return _random(model, job, choice)
    fitted = plan(model, job.to, fitted=True, **choice).needs_calibration
    given = {"calibration": texts() if fitted else None, "tokenizer": tokenizer, "distill_steps": job.distill_steps}
    return convert(model, job.to, **given, **choice)


def _random(model: PreTrainedModel, job: ModelOptions, choice: SiteChoice) -> Report:
    """Convert the shapes only: the projections of converted FFNs get the family's own random initialisation.

    What has no biases gets none: they would only stand in for weights that are kept.
    """
    assert job.to
    texts = torch.randint(0, vocabulary(model.config) or CHARACTERS, (4, 16))
    shape: dict[str, Any] = {**choice, "bias": False, "fitted": True}
    needed = plan(model, job.to, **shape).needs_calibration
    shape = {**choice, "bias": False, "calibration": texts if needed else None}
    report = convert(model, job.to, check=False, distill_steps=0, **shape)
    names = {step.site.name for step in report.plan.steps if step.changes}
    initialise_anew(model, [part for site in find_sites(model) if site.name in names for part in projections(site)])
    return report


@torch.no_grad()
def _part_experts(model: PreTrainedModel, spread: list[list[Tensor]]) -> None:
    """Draw the weights of every expert anew, as wide spread as its FFN's were; biases are 0.

    From scratch, copies of one random FFN would be no better a start than one, and only the router could part them.

    Args:
        model: with experts.
        spread: the standard deviations of the projections of each FFN that has become experts, the out-projection last.
    """
    for experts, (first, *_, last) in zip(find_experts(model).values(), spread, strict=True):
        for bank in (*banks_of(experts.banks), *banks_of(experts.shared)):
            bank.in_proj.normal_(0, float(first))
            bank.out_proj.normal_(0, float(last))
            for bias in (bank.in_bias, bank.out_bias):
                if bias is not None:
                    bias.zero_()


def initialise_anew(model: PreTrainedModel, modules: Sequence[nn.Module]) -> None:
    """Initialise modules as their family does, and nothing else.

    A family may do so for a module by itself, or for the one that holds it: GPT-2's out-projections are smaller the
    deeper the model is, T5's go by its sizes.
    """
    new = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
    holders = [each for each in model.modules() if any(child in modules for child in each.children())]
    others = [parameter for holder in holders for parameter in holder.parameters() if id(parameter) not in new]
    known = [INITIALIZED.of(parameter, False) for parameter in others]
    for part in (*modules, *(parameter for module in modules for parameter in module.parameters(recurse=False))):
        INITIALIZED.put(part, False)
    for parameter in others:
        INITIALIZED.put(parameter, True)
    for module in (*modules, *holders):
        INIT_WEIGHTS.of(model)(module)
    for parameter, before in zip(others, known, strict=True):
        INITIALIZED.put(parameter, before)
