"""The curve of an activation, the coefficients of a mix, thresholds and slopes: as numbers for a report.

Shapes: N tokens, W channels, K functions of a mix, B texts, R size of the context vector, G grid points.
"""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hf_glu.activation.learnable import LearnableMix, mixes
from hf_glu.activation.modulated import Modulation
from hf_glu.activation.module import innermost

GRID = torch.linspace(-4, 4, 41)
BAND = torch.tensor([0.1, 0.9])  # quantiles of the channels' curves
DIGITS = 6  # significant ones


class Mixing:
    """The running sums of a mix's coefficients."""

    def __init__(self, module: LearnableMix) -> None:
        self.module, self.count = module, 0
        self.total, self.squares = (torch.zeros(len(module.names), dtype=torch.float64) for _ in range(2))
        self.channels: Tensor | None = None

    @classmethod
    def of(cls, act: nn.Module) -> Mixing | None:
        """Return those of an activation, None where it mixes nothing."""
        found = mixes(act)
        return cls(found[0]) if found else None

    def add(self, x: Tensor) -> None:
        """Add the tokens ``x``, ``[N, W]``."""
        self.channels, rows = self.module.to(x.device).weights(x)
        if rows is not None:
            self.count += len(rows)
            self.total += rows.double().sum(0).cpu()
            self.squares += rows.double().square().sum(0).cpu()

    def mean(self) -> Tensor:
        """Return the mean coefficients, ``[K]``."""
        rows = self.total / max(1, self.count)
        return rows if self.channels is None else rows + self.channels.double().mean(1).cpu()

    def spread(self) -> Tensor | None:
        """Return one standard deviation over tokens and channels, ``[K]``; None where all share the coefficients."""
        if self.channels is None and getattr(self.module, "choice", None) is None:
            return None
        rows = self.squares / max(1, self.count) - (self.total / max(1, self.count)).square()
        own = 0 if self.channels is None else self.channels.double().var(1, correction=0).cpu()
        return (rows.clamp_min(0) + own).sqrt()

    def to_dict(self, before: Mixing | None) -> dict[str, Any]:
        """Return the functions and their coefficients."""
        values = {"before": None if before is None else before.mean(), "after": self.mean(), "spread": self.spread()}
        return {"functions": list(self.module.names), **{key: _plain(each) for key, each in values.items()}}


Measured: TypeAlias = tuple[nn.Module, Mixing | None]  # an activation and its mix


def modulation_of(act: nn.Module) -> Modulation | None:
    """Return the modulation in an activation, None where there is none."""
    found = (part for part in act.modules() if isinstance(part, Modulation))
    return next((part for part in found if part.options is not None), None)


def modulated_by(shift: Modulation, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return threshold and slope of each channel, ``[W]``, for the mean of ``vectors`` ``[B, R]``."""
    threshold, slope = (weight.detach().float().cpu() @ vectors.mean(0) for weight in (shift.threshold, shift.slope))
    return threshold, 1 + slope


def modulation_row(shift: Modulation, vectors: Tensor, name: str | None, texts: list[int]) -> dict[str, Any]:
    """Return the threshold and the slope of some of the texts.

    Args:
        shift: what they belong to.
        vectors: the context vectors of all texts, ``[B, R]``.
        name: the type of those texts; None: they are all.
        texts: their numbers.

    Returns:
        ``type``, the number of ``texts``, and, for both: the mean over channels (``threshold``), their standard
        deviation (``threshold_spread``), and how far they are from those of all texts, as the root mean square over
        channels (``threshold_apart``; None for all texts).
    """
    row: dict[str, Any] = {"type": name, "texts": len(texts)}
    both = zip(modulated_by(shift, vectors[texts]), modulated_by(shift, vectors), strict=True)
    for key, (own, every) in zip(("threshold", "slope"), both, strict=True):
        apart = None if name is None else (own - every).square().mean().sqrt()
        values = {"": own.mean(), "_spread": own.std(correction=0), "_apart": apart}
        row |= {key + end: None if value is None else _short(float(value)) for end, value in values.items()}
    return row


def curve_rows(after: Measured, before: Measured | None, vectors: Tensor | None) -> dict[str, Any]:
    """Return the curves of an activation as it is and was: ``g``, ``before``, ``after``, ``low``, ``high``."""
    values = _curves(*after, vectors)
    low, high = values.quantile(BAND, dim=1) if values.shape[1] > 1 else (None, None)
    old = None if before is None else _curves(*before, vectors).mean(1)
    rows = {"g": GRID, "before": old, "after": values.mean(1), "low": low, "high": high}
    return {key: _plain(each) for key, each in rows.items()}


@torch.no_grad()
def _curves(act: nn.Module, mix: Mixing | None, vectors: Tensor | None) -> Tensor:
    """Return the values of each channel, with u = 1, ``[G, W]``; ``[G, 1]`` where channels are alike."""
    z, shift = GRID.unsqueeze(1), modulation_of(act)
    if shift is not None and vectors is not None:
        threshold, slope = modulated_by(shift, vectors)
        z = slope * (z - threshold)
    if (formula := getattr(act, "formula", None)) is not None:
        value: Tensor = formula(z, torch.ones_like(z))
        return value
    inner = copy.deepcopy(innermost(act)[1]).float().cpu()
    functions: list[Any] = [inner] if mix is None else list(inner.functions)  # type: ignore[arg-type]
    coefficients = torch.ones(1) if mix is None else mix.mean().float()
    if not getattr(inner, "elementwise", True):  # the grid is then the channels of one token
        return inner(z.mT).mT
    return torch.stack([a * phi(z) for a, phi in zip(coefficients, functions, strict=True)]).sum(0)


def _plain(values: Tensor | None) -> list[float] | None:
    return None if values is None else [_short(value) for value in values.tolist()]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
