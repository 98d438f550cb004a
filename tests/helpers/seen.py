"""Texts with padding, and what a raw hook and the recorder see of a model that runs on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.instruments.recorder import Kept, Watch, watching

B, T = 3, 9
IDS = torch.randint(5, 60, (B, T), generator=torch.Generator().manual_seed(1))
RIGHT = (torch.arange(T) < torch.tensor([[9], [4], [1]])).long()
LEFT = RIGHT.flip(1)
MASKS = {"right": RIGHT, "left": LEFT}
TARGETS = torch.randint(5, 60, (B, 6), generator=torch.Generator().manual_seed(2))
OTHER = (torch.arange(6) < torch.tensor([[2], [6], [5]])).long()


def raw(model: Any, module: nn.Module, **inputs: Any) -> list[Tensor]:
    """Return all that a module is given, padding and all."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return found


def recorded(model: Any, module: nn.Module, **inputs: Any) -> Tensor:
    """Return what the recorder keeps of it."""
    kept = Kept(10_000)
    with torch.no_grad(), watching(model, [Watch(module=module, see=kept.see)]):
        model(**inputs)
    return kept.tensor()
