"""Modules of elementwise activations: Transformers' own (and whatever a user adds to its ``ACT2FN``)."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN, ClippedGELUActivation, GELUActivation

from hf_glu.activation.stock import is_elementwise
from hf_glu.compat.of_models import ACTIVATION_TABLE
from hf_glu.config.registry import registry
from hf_glu.inplace import stock_class


def build_elementwise(name: str) -> nn.Module:
    """Build a fresh elementwise activation.

    Raises:
        UnknownNameError: there is none of this name.
    """
    if not is_elementwise(name):
        raise registry.unknown(name, "elementwise ")
    entry = registry.find(name)
    return ACTIVATION_TABLE.find().__getitem__(ACT2FN, name) if entry is None else entry.factory()


# torch computes a transcendental function of a view otherwise than of a contiguous tensor (GELU on a CPU by 1e-6,
# others by an ulp), so that a gate half must be copied to give the dense activation's bits. These don't care.
LAYOUT_FREE = frozenset({"relu", "relu2", "relu6", "leaky_relu", "prelu", "linear", "hardswish"})
# Those which torch computes by another library where the tensor is contiguous; others only differ in a row's last
# elements, too few for a vector.
OTHER_LIBRARY = (nn.GELU, GELUActivation, ClippedGELUActivation)


SAME_VALUE = 2e-6


def name_of(act: nn.Module, candidates: tuple[str, ...]) -> str | None:
    """Return the first of ``candidates`` whose module is of the same class as ``act``, else one of the same values."""
    built: dict[str, nn.Module] = {}
    kind = stock_class(act)  # under a hook of ours, too
    for name in filter(is_elementwise, dict.fromkeys(candidates)):
        built[name] = build_elementwise(name)
        if type(built[name]) is kind:  # no more are built than need be: xIELU warns where its kernels are missing
            return name
    return _name_by_value(act, built)


@torch.no_grad()
def _name_by_value(act: nn.Module, built: dict[str, nn.Module]) -> str | None:
    """Return the name whose function ``act`` computes, up to rounding: families write GELU and others themselves."""
    if any(True for _ in act.parameters()):
        return None
    grid = torch.linspace(-6, 6, 1001)
    try:
        value = act(grid)
        distances = {
            name: float((module(grid) - value).abs().max())
            for name, module in built.items()
            if not list(module.parameters())
        }
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None  # it takes more than a tensor: I-BERT's
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= SAME_VALUE else None
