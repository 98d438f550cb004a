"""The activations of a model that have parameters of their own."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn
from transformers.activations import ACT2FN

from hf_glu.activation.modulated import ContextSource
from hf_glu.activation.module import OwnedActivation


def activations(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost activations that have parameters, by name."""
    classes = _activation_classes()
    found: dict[str, nn.Module] = {}
    inner: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, classes) and id(module) not in inner and any(True for _ in module.parameters()):
            found[name] = module
            inner |= {id(part) for part in module.modules()}
    return found


def _activation_classes() -> tuple[type[nn.Module], ...]:
    """Return our own classes, and those of Transformers' activations: a native family's PReLU is one."""
    entries = [entry[0] if isinstance(entry, tuple) else entry for entry in OrderedDict.values(ACT2FN)]
    return (OwnedActivation, ContextSource, *(entry for entry in entries if isinstance(entry, type)))
