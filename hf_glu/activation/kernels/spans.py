"""The rows of experts that lie one expert after the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

Spans = list[tuple[int, slice]]


def spans_of(sizes: Sequence[int]) -> Spans:
    """Return the experts that have rows, each with its rows."""
    ends = accumulate(sizes, initial=0)
    return [(expert, slice(*span)) for expert, span in enumerate(pairwise(ends)) if span[0] < span[1]]
