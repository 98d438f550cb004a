"""The kinds of FFNs that every tool around Transformers is tried on, a pico model each, and what is asked of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pico import FAMILIES, make_native
from states import ids
from torch import Tensor

import hf_glu
from hf_glu.activation.module import OwnedModule
from hf_glu.config.experts import ExpertOptions
from hf_glu.ffn.experts.native import MixedBank

# kind -> family, target, options: a decoder each, since some tools know nothing else
KINDS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "geglu": ("gpt_neox", "geglu", {}),
    "reglu, native": ("llama", "reglu", {}),
    "learnable": ("llama", "learnable_swiglu", {}),
    "stateful": ("llama", "stateful_swiglu", {}),
    "canon": ("llama", "canon_swiglu", {}),
    "modulated": ("llama", "modulated_swiglu", {}),
    "experts": ("llama", "swiglu", {"experts": ExpertOptions(groups="swiglu*2,reglu*2", balance=0.5, z=0.1)}),
    "native bank": ("mixtral", None, {"experts": "silu,relu"}),
}
Make = Callable[[], Any]


def make(kind: str) -> Any:
    """Return a converted model in which everything that a kind adds does something."""
    family, target, options = KINDS[kind]
    model = FAMILIES[family].make() if family in FAMILIES else make_native(family)
    hf_glu.convert(model, target, check=False, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # louder: pico models say nearly nothing
            if parameter.ndim > 1:
                parameter.mul_(4)
        for module in model.modules():
            if isinstance(module, OwnedModule | MixedBank):
                for parameter in module.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.eval()


def inputs(rows: int = 2, tokens: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Return texts, the last of which ends in padding."""
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[-1, -3:] = 0
    return {"input_ids": ids(rows, tokens, seed=seed), "attention_mask": mask}


SHAPES = ((2, 12), (3, 7), (1, 19))


@torch.no_grad()
def answers(call: Callable[..., Any], shapes: tuple[tuple[int, int], ...] = SHAPES) -> dict[str, Tensor]:
    """Return the logits of what is no padding, on texts of several lengths and numbers."""
    found = {}
    for rows, tokens in shapes:
        given = inputs(rows, tokens)
        out = call(**given)
        logits = out if isinstance(out, Tensor) else out["logits"]
        found[f"{rows} x {tokens}"] = logits[given["attention_mask"].bool()].float()
    return found


def saved(model: Any, folder: Path) -> Path:
    """Save a model and return where."""
    model.save_pretrained(folder)
    return folder


def gradients(model: Any) -> dict[str, Tensor]:
    """Return what the last backward pass has left."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
