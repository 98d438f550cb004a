"""Several fine-tunes of one architecture: whether they are that, and their mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.conversion.checks import check_convertible, check_values
from hf_glu.conversion.transaction import ties
from hf_glu.errors import ConversionError, OptionError, shown
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.forward import projections
from hf_glu.ffn.sites import convertible_sites, find_banks

# what fine-tunes of one model may say of themselves otherwise: names, labels, what only training or generation reads
OF_THEIR_OWN = frozenset(
    "_name_or_path name_or_path transformers_version architectures dtype torch_dtype id2label label2id problem_type "
    "finetuning_task task_specific_params use_cache initializer_range output_hidden_states output_attentions".split()
)


def check_alike(models: Sequence[Any]) -> None:
    """Check that models can be merged; nothing is changed.

    Raises:
        OptionError: fewer than two; or another class, config, shape, dtype or sharing of parameters than the first's.
        ConversionError: one that can't be converted as it is, or has experts already.
    """
    if not isinstance(models, (list, tuple)) or len(models) < 2:
        count = len(models) if isinstance(models, (list, tuple)) else f"a {type(models).__name__}"
        raise OptionError(f"merging needs a list of two models at least, got {count}")
    for number, model in enumerate(models, 1):
        check_convertible(model)
        check_values(model)
        if find_experts(model) or find_banks(model):
            raise ConversionError(f"model {number} has experts already: merge dense models, whose FFNs become experts")
    first = models[0]
    for number, model in enumerate(models[1:], 2):
        if type(model) is not type(first):
            kinds = f"model {number} is a {type(model).__name__}, and the first a {type(first).__name__}"
            raise OptionError(f"{kinds}: models of one class are merged")
        _check_config(first.config.to_dict(), model.config.to_dict(), number)
        _check_tensors(first, model, number)


def _check_config(first: dict[str, Any], other: dict[str, Any], number: int, where: str = "") -> None:
    """Raise OptionError for what two configs say otherwise."""
    for key in {**first, **other}:
        mine, theirs = first.get(key), other.get(key)
        if key in OF_THEIR_OWN or "drop" in key or mine == theirs:
            continue
        if isinstance(mine, dict) and isinstance(theirs, dict):
            _check_config(mine, theirs, number, f"{where}{key}.")
            continue
        raise OptionError(
            f"model {number} has {where}{key} {shown(theirs)}, and the first {shown(mine)}: models of one config are "
            "merged"
        )


def _check_tensors(first: nn.Module, other: nn.Module, number: int) -> None:
    """Raise OptionError where weights have other names, shapes or dtypes, or are shared otherwise."""
    mine, theirs = first.state_dict(), other.state_dict()
    for key in {**mine, **theirs}:
        here, there = (_kind(state.get(key)) for state in (mine, theirs))
        if here != there:
            raise OptionError(
                f"{key} is {there} in model {number}, and {here} in the first: their shapes must be alike"
            )
    shared, others = (set(ties(model).values()) for model in (first, other))
    if shared != others:
        tied = min(shared ^ others)
        raise OptionError(f"model {number} and the first don't both share {' and '.join(tied[:2])} between modules")


def _kind(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def task_head(model: Any) -> set[str]:
    """Return the names of the parameters of a task's head: a classifier's, say, but not a language model's."""
    base, words = model.base_model, model.get_output_embeddings()
    if base is model or words is not None:
        return set()
    inside = {id(parameter) for parameter in base.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in inside}


def _ffn_parameters(model: nn.Module) -> Iterator[Tensor]:
    for site in convertible_sites(model):
        for part in (*projections(site), site.act):
            yield from part.parameters()


@torch.no_grad()
def average(model: Any, others: Sequence[Any]) -> None:
    """Set what is no FFN and no task's head in ``model`` to the mean of it and ``others``, in place.

    mean = a + sum_i (b_i - a) / n in float64, which is a itself where all are the same; then rounded to a's dtype.
    Parameters that modules share stay shared. Buffers with fractions are averaged, too.
    """
    left = {id(parameter) for parameter in _ffn_parameters(model)}
    heads, tables = task_head(model), [dict(_tensors(other)) for other in others]
    for name, tensor in _tensors(model):
        if id(tensor) in left or name in heads or not tensor.is_floating_point():
            continue
        wide = tensor.double()
        change = torch.stack([table[name].to(wide) - wide for table in tables]).sum(0) / (len(others) + 1)
        tensor.copy_(wide + change)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
