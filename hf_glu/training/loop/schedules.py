"""Learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hf_glu.training.options import TrainingOptions

# share of the steps after warm-up -> share of the peak
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}


def make_schedule(optimizer: Optimizer, options: TrainingOptions, steps: int) -> LambdaLR:
    """Make the schedule: a linear rise for ``warmup`` of the steps, then the decay of ``options.schedule``.

    It counts optimizer steps, however many processes share them.
    """
    warmup, decay = int(options.warmup * steps), DECAYS[options.schedule]

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return decay(min(1.0, (step - warmup) / max(1, steps - warmup)))

    return LambdaLR(getattr(optimizer, "optimizer", optimizer), factor)
