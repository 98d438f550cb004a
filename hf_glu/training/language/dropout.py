"""Dropout turned off while a model learns to be like another: what it drops would count as a difference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Drop nothing within the block: neither values (attention's, too) nor layers; the config stays as it is."""
    found = {(module, name): value for module in model.modules() for name, value in _rates(module).items()}
    try:
        for module, name in found:
            setattr(module, name, 0.0)
        yield
    finally:
        for (module, name), value in found.items():
            setattr(module, name, value)


def _rates(module: nn.Module) -> dict[str, float]:
    """Return the rates that a module keeps, by attribute: Transformers hands attention's to a function."""
    names = ("p",) if isinstance(module, DROPOUTS) else [name for name in vars(module) if "drop" in name]
    return {name: value for name in names if isinstance(value := getattr(module, name), float)}
