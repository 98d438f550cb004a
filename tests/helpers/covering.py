"""Grids of cases of which a few are quick tests, in which every value occurs, and the others slow ones."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def covering(*axes: Iterable[Any]) -> list[Any]:
    """Return every combination of values; slow are all but one for each value of the longest axis.

    The other axes' values take turns in these, so that each value of each axis is in a quick test.
    """
    values = [list(axis) for axis in axes]
    longest = max(values, key=len)
    turns = {tuple(at % len(each) for each in values) for at in range(len(longest))}
    places = product(*(range(len(each)) for each in values))
    return [
        pytest.param(*(each[at] for each, at in zip(values, place, strict=True)),
                     marks=() if place in turns else pytest.mark.slow)
        for place in places
    ]  # fmt: skip


def alternating(cases: Iterable[tuple[Any, Any]], quick_ones: int = 2) -> list[Any]:
    """Return cases of two values; slow are all but some for each first one, which take turns among the second."""
    rows: dict[Any, list[Any]] = {}
    for first, second in cases:
        rows.setdefault(first, []).append(second)
    quick = {(first, seconds[(number + step * len(seconds) // quick_ones) % len(seconds)])
             for number, (first, seconds) in enumerate(rows.items()) for step in range(quick_ones)}  # fmt: skip
    return [
        pytest.param(first, second, marks=() if (first, second) in quick else pytest.mark.slow)
        for first, seconds in rows.items() for second in seconds
    ]  # fmt: skip


def few(cases: Iterable[Any], step: int, *, tuples: bool = False) -> list[Any]:
    """Return cases of which each ``step``-th is quick, from the first on; ``tuples``: of several values each."""
    values = [case if tuples else (case,) for case in cases]
    return [pytest.param(*each, marks=pytest.mark.slow if at % step else ()) for at, each in enumerate(values)]
