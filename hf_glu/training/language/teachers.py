"""The teacher that a model is healed by: which checkpoint it is, loading it, and whether it can teach this model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_glu.checkpoint.config_file import check_config, reading
from hf_glu.checkpoint.files import REPORT_FILE, TOKENIZER_FILES
from hf_glu.checkpoint.gguf import SUFFIX, is_gguf, load_gguf, load_gguf_tokenizer
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.jsonio import read_object
from hf_glu.checkpoint.loading import forget_code, load_tokenizer
from hf_glu.checkpoint.provenance import base_of
from hf_glu.checkpoint.writing import user_path
from hf_glu.config.traits import text_config, vocabulary
from hf_glu.errors import OptionError
from hf_glu.training.language.models import model_class
from hf_glu.training.language.objectives import HIDDEN, Objective
from hf_glu.training.language.options import LanguageOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# what hidden states have -> where configs say how many
_SHAPES = {"channels": "hidden_size", "layers": "num_hidden_layers"}
BASE = "base"  # as a teacher: what the model was converted from


def find_teacher(job: LanguageOptions) -> str:
    """Return where a job's teacher is: what it names, or for ``base`` the checkpoint that the model is made from.

    Of a model that is converted in this run, that is the model itself; of a converted folder what its report names: a
    repository, or a folder or GGUF file of that name beside it.

    Raises:
        OptionError: the model wasn't converted, or its base isn't there.
    """
    assert job.teacher
    if job.teacher != BASE:
        return job.teacher
    report = {} if is_gguf(job.model) else _report(resolve(job.model))
    if "promise" not in report:
        if job.conversion:
            return job.model
        raise OptionError(f"{job.model} wasn't converted, so that it has no base: name the teacher")
    base = base_of(job.model)
    if base["repository"]:
        return base["name"]
    beside = user_path(job.model).absolute().parent / base["name"]
    for path in (beside, beside.with_name(beside.name + SUFFIX), Path(base["name"])):
        if path.exists():
            return str(path)
    raise OptionError(f"the base of {job.model} is {base['name']}, which isn't beside it: give its path as the teacher")


def _report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT_FILE
    return read_object(path) if path.is_file() else {}


def load_teacher(source: str, objective: Objective, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, bool]:
    """Load a teacher in float32, with the head that the objective needs, frozen and in eval mode.

    Returns:
        The teacher, and whether it is known to read the tokens that ``tokenizer`` gives: it has a tokenizer beside it.

    Raises:
        CheckpointError: it can't be found or loaded.
        OptionError: it has no such head, or reads other tokens than ``tokenizer`` gives.
    """
    import transformers

    if is_gguf(source):
        if objective.name not in ("clm", HIDDEN):
            raise OptionError(f"a GGUF file predicts the next token, and can't teach {objective.name}")
        model, own = load_gguf(source), load_gguf_tokenizer(source)
        return _frozen(model, source, own, tokenizer)
    folder = resolve(source)
    check_config(folder)
    with reading(source, why="can't be loaded as a teacher"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model, info = model_class(objective.name, config).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    if (missing := sorted(info["missing_keys"])) and objective.name != HIDDEN:
        raise OptionError(
            f"the teacher {source} has no language-model head ({missing[0]} is missing), which {objective.name} needs"
        )
    forget_code(model.config)
    known = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return _frozen(model, source, load_tokenizer(folder) if known else None, tokenizer)


def _frozen(
    model: Any, source: str, own: PreTrainedTokenizerBase | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, bool]:
    if own is not None and own.get_vocab() != tokenizer.get_vocab():
        raise OptionError(
            f"the teacher {source} has another vocabulary ({len(own):,} tokens) than the model ({len(tokenizer):,}): "
            "it must read the same tokens"
        )
    return model.eval().requires_grad_(False), own is not None


def check_alike(model: PreTrainedModel, teacher: PreTrainedModel, *, logits: bool, matched: tuple[str, ...]) -> None:
    """Check that what is compared of two models has the same shape.

    Args:
        model, teacher: the two.
        logits: whether their logits are, and it isn't known that they read the same tokens: where it is, what one
            has more is padding.
        matched: what else is: ``ffn``, ``hidden``.

    Raises:
        OptionError: it hasn't.
    """
    own, other = vocabulary(model.config), vocabulary(teacher.config)
    if logits and own != other:
        raise OptionError(
            f"the teacher's vocabulary has {other or 0:,} tokens, the model's {own or 0:,}: no logits match"
        )
    for what, name in _SHAPES.items() if matched else ():
        here, there = (getattr(text_config(each.config), name, None) for each in (model, teacher))
        if here != there and (what == "channels" or "hidden" in matched):
            raise OptionError(f"the teacher's hidden states have {there} {what}, the model's {here}: give match=none")
