"""What the recipes of stateful activations share: a training loop, and lists of numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import hf_glu
from hf_glu.errors import OptionError
from hf_glu.training.options import TrainingOptions
from hf_glu.training.schedules import make_schedule

WEIGHT_DECAY, WARMUP, CLIP = 0.01, 0.1, 1.0


def train(
    model: Any, batch: Callable[[int], dict[str, Tensor]], steps: int, *, lr: float, factor: float, title: str
) -> None:
    """Train on ``batch(0)``, ..., ``batch(steps - 1)`` with AdamW and a cosine schedule.

    Alpha, beta and the decays, which have no weight decay, get ``factor`` times the learning rate.
    """
    optimizer = torch.optim.AdamW(hf_glu.parameter_groups(model, lr, WEIGHT_DECAY, activation_lr=factor * lr))
    schedule = make_schedule(optimizer, TrainingOptions(schedule="cosine", warmup=WARMUP), steps)
    model.train()
    for step in (bar := tqdm(range(steps), desc=title, leave=False)):
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
