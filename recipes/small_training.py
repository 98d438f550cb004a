"""What the recipes that train small models from scratch share: a training loop, and lists of numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hf_glu
from hf_glu.config.showing import progress_bar
from hf_glu.errors import OptionError
from hf_glu.training.loop.schedules import make_schedule
from hf_glu.training.options import TrainingOptions

WEIGHT_DECAY, CLIP = 0.01, 1.0


def train(
    model: Any, batch: Callable[[int], dict[str, Tensor]], steps: int, *, lr: float, title: str, factor: float = 1.0,
    warmup: float = 0.1,
) -> None:  # fmt: skip
    """Train on ``batch(0)``, ..., ``batch(steps - 1)`` with AdamW and a cosine schedule.

    The learning rate rises for the share ``warmup`` of the steps. What activations have of their own (alpha, beta, the
    decays) has no weight decay, and ``factor`` times the learning rate.
    """
    optimizer = torch.optim.AdamW(hf_glu.parameter_groups(model, lr, WEIGHT_DECAY, activation_lr=factor * lr))
    schedule = make_schedule(optimizer, TrainingOptions(schedule="cosine", warmup=warmup), steps)
    model.train()
    for step in (bar := progress_bar(range(steps), desc=title, leave=False)):
        loss = model(**batch(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}")


def read_numbers(text: str, option: str) -> list[int]:
    """Read ``0,1,2``.

    Raises:
        OptionError: anything else.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise OptionError(f"{option} must be numbers such as 0,1,2, got {text!r}")
    return [int(part) for part in parts]
