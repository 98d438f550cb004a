"""The statistics of a comparison: intervals, paired tests and their correction, and tokens to a loss."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, stdev

import numpy as np

LEVEL = 0.95
SAME = 1e-12  # differences that differ by less are one number

Curve = Sequence[tuple[float, float]]


def interval(values: Sequence[float]) -> list[float] | None:
    """Return the 95 % interval of the mean of ``values`` by Student's t; None of fewer than two."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    mean, count = fmean(values), len(values)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * stdev(values) / count**0.5
    return [mean - half, mean + half]


def paired_p(scores: Sequence[float], reference: Sequence[float]) -> float | None:
    """Return the two-sided p-value of a t-test on the seeds' differences; None where it isn't defined."""
    from scipy.stats import ttest_rel

    differences = np.subtract(scores, reference)
    if len(differences) < 2 or np.ptp(differences) < SAME:
        return None
    return float(ttest_rel(scores, reference).pvalue)


def holm(p_values: Sequence[float | None], count: int) -> list[float | None]:
    """Return p-values corrected for there being several tests (Holm 1979).

    The smallest of m is multiplied by m, the next by m - 1, and so on; none is less than one before it, or above 1.

    Args:
        p_values: of the tests; None stays None.
        count: m, of all that was compared, also where no test is defined, which is like a p-value of 1.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    found: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, place) in enumerate(order):
        found[place] = least = max(least, min(1.0, (count - rank) * p))
    return found


def tokens_to(curve: Curve, target: float) -> float | None:
    """Return after how many tokens a loss is ``target``, by lines between evaluations; None: it never is.

    Args:
        curve: (tokens, loss) of each evaluation, in order. What comes before the first isn't known: where that is at
            the target already, its tokens are returned.
    """
    if curve and curve[0][1] <= target:
        return curve[0][0]
    for (before, above), (after, loss) in pairwise(curve):
        if loss <= target:
            return before + (after - before) * (above - target) / (above - loss)
    return None
