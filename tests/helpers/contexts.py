"""Pico models whose gates are shifted by a context vector that does something."""

from __future__ import annotations

from typing import Any

import mixers
import torch
from pico import FAMILIES, make_native

import hf_glu
from hf_glu.activation.modulated import ContextSource, Modulation
from hf_glu.activation.stateful import Memory

BASE = {"t5_v1_1": "geglu_new", "modernbert": "geglu"}


def make(name: str) -> Any:
    """Return a pico model, dense, native or a Mamba, by its family's name."""
    if name in mixers.MODELS:
        return mixers.make(name)
    return FAMILIES[name].make() if name in FAMILIES else make_native(name)


def target_of(name: str) -> str:
    """Return the gated activation, without wrappers, that the family converts to exactly."""
    return FAMILIES[name].exact if name in FAMILIES else BASE.get(name, "swiglu")


def awake(name: str, prefix: str = "modulated_", **more: Any) -> Any:
    """Return a converted model whose context, and states where ``prefix`` has them, do something."""
    model = make(name)
    hf_glu.convert(model, prefix + target_of(name), check=False, **more)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not name.startswith("Mamba"):
                parameter.mul_(3)
        for module in model.modules():
            for key in ("threshold", "slope") if isinstance(module, Modulation) else ():
                parameter = getattr(module, key)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2)
            if isinstance(module, ContextSource):
                module.weight.mul_(5)
            for key in ("alpha", "beta") if isinstance(module, Memory) else ():
                getattr(module, key).copy_(torch.randn(module.alpha.shape, generator=generator) * 2)
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
    return model.eval()
