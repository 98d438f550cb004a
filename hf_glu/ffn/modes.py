"""Whether a module trains: left as it was, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keeping_modes(module: nn.Module, *, training: bool | None = None) -> Iterator[None]:
    """Leave every part of a module in the mode that it was in, whatever the block does to them.

    Args:
        module: of which each part has its own mode: one that is frozen may be evaluating in a model that trains.
        training: the mode of all parts as the block begins; None: each part's own.
    """
    modes = [(part, part.training) for part in module.modules()]
    if training is not None:
        module.train(training)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
