"""Models whose experts hear their router, with something to hear."""

from __future__ import annotations

from typing import Any

import torch
from contexts import make, target_of
from states import without_dropout

import hf_glu
from hf_glu.activation.kappa import Sharpness
from hf_glu.activation.wrapped import shifts
from hf_glu.ffn.experts import find_experts

MODELS = ("bert", "gpt2", "t5", "llama")


def awake(model: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for shift in shifts(model):
            if isinstance(shift, Sharpness):
                shift.response.copy_(3 * torch.randn(shift.response.shape, generator=generator))
        for ffn in find_experts(model).values():
            ffn.router.weight.mul_(20)
    return model


def converted(name: str = "gpt2", prefix: str = "kappa_", **more: Any) -> Any:
    model = make(name)
    hf_glu.convert(model, f"{prefix}{target_of(name)}", check=False, **{"experts": 3, **more})
    return without_dropout(awake(model))
