"""The curve of a way of steering: the target's score, and what it costs in perplexity, at each strength.

The cost of a strength is the larger of two ratios to the unsteered model: of the perplexity that the unsteered model
has on what the steered one writes, and of the steered model's on neutral text. The area at equal perplexity is

    area = mean over budgets r of  max score - min score  at strengths from 0 on whose cost is at most r

over budgets from 1 to the largest, evenly spaced in log r; scores and log costs are lines between the strengths. It is
0 where nothing is gained, and 1 where the target is turned fully on and off for free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

BUDGETS, BETWEEN = 33, 20  # budgets, and places between two strengths


@dataclass(frozen=True, kw_only=True)
class Dose:
    """What was measured at one strength.

    Attributes:
        strength: as it was asked for, before the way's unit.
        score: the mean of what was written, between 0 and 1; NaN: nothing could be.
        own: the unsteered model's perplexity on it.
        neutral: the steered model's on neutral text.
        example: the first text that was written.
    """

    strength: float
    score: float
    own: float
    neutral: float
    example: str = ""

    @property
    def broken(self) -> bool:
        """Whether a perplexity is infinite, or nothing could be written."""
        return not all(map(math.isfinite, (self.score, self.own, self.neutral)))

    def cost(self, base: Dose) -> float:
        """Return how many times the perplexity of ``base`` it costs, 1 at least."""
        return math.inf if self.broken else max(1.0, self.own / base.own, self.neutral / base.neutral)


def breaks(doses: Sequence[Dose]) -> list[float]:
    """Return the strengths nearest to 0 on either side, at which a way breaks."""
    broken = [dose.strength for dose in doses if dose.broken]
    below, above = [each for each in broken if each < 0], [each for each in broken if each > 0]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def area(doses: Sequence[Dose], budget: float) -> float:
    """Return the area at equal perplexity of ``doses``, of which one has strength 0; NaN: that one is broken."""
    base = next(dose for dose in doses if dose.strength == 0)
    if base.broken:
        return math.nan
    sides = [_side(doses, base, sign) for sign in (1, -1)]
    found = []
    for at in range(BUDGETS):
        allowed = math.log(budget) * at / (BUDGETS - 1) + 1e-12
        reached = [score for side in sides for score in _within(side, allowed)]
        found.append(max(reached) - min(reached))
    return fmean(found)


def spent(doses: Sequence[Dose], budget: float) -> bool:
    """Return whether the largest strengths of both sides cost the whole budget, so that the area is all there is."""
    base = next(dose for dose in doses if dose.strength == 0)
    ends = [dose for dose in (doses[0], doses[-1]) if dose.strength]
    return all(dose.cost(base) >= budget for dose in ends)


def _side(doses: Sequence[Dose], base: Dose, sign: int) -> list[tuple[float, float]]:
    """Return (log cost, score) from strength 0 outwards, up to where it breaks, by lines between the strengths."""
    outwards = sorted((dose for dose in doses if dose.strength * sign >= 0), key=lambda dose: abs(dose.strength))
    found = [(0.0, base.score)]
    for one, other in pairwise(outwards):
        if other.broken:
            break
        costs = math.log(one.cost(base)), math.log(other.cost(base))
        for step in range(1, BETWEEN + 1):
            share = step / BETWEEN
            found.append((costs[0] + share * (costs[1] - costs[0]), one.score + share * (other.score - one.score)))
    return found


def _within(side: Sequence[tuple[float, float]], allowed: float) -> list[float]:
    """Return the scores up to the first point that costs more than is allowed."""
    reached = []
    for cost, score in side:
        if cost > allowed:
            break
        reached.append(score)
    return reached


def to_row(doses: Sequence[Dose], budget: float) -> dict[str, Any]:
    """Return a curve as plain data."""
    base = next(dose for dose in doses if dose.strength == 0)
    points = [
        {"strength": dose.strength, "score": dose.score, "own": dose.own, "neutral": dose.neutral,
         "cost": dose.cost(base), "example": dose.example}
        for dose in doses
    ]  # fmt: skip
    return {"points": points, "area": area(doses, budget), "breaks": breaks(doses), "spent": spent(doses, budget)}
