"""The progress of a training loop, and its result."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import cast

from hf_glu.training.results import TrainingSummary


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The result of a training loop; ``loss`` is the mean over its last tenth."""

    steps: int
    seconds: float
    loss: float
    tokens_per_second: float
    stopped_early: bool = False
    tokens: int = 0

    def to_dict(self) -> TrainingSummary:
        """Return the result as plain data."""
        return cast(TrainingSummary, asdict(self))


@dataclass
class Progress:
    """The progress of a training loop, which a checkpoint keeps beside weights, optimizer and random states.

    ``alerts`` are the events that have been told and aren't over, where the training is watched.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best: float = -math.inf
    best_step: int = 0
    waited: int = 0
    lines: int = 0
    losses: list[float] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)
