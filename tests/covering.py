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


def alternating(cases: Iterable[tuple[Any, Any]]) -> list[Any]:
    """Return cases of two values; slow are all but two for each first value, which take turns among the second ones."""
    rows: dict[Any, list[Any]] = {}
    for first, second in cases:
        rows.setdefault(first, []).append(second)
    quick = {(first, seconds[(number + step) % len(seconds)]) for number, (first, seconds) in enumerate(rows.items())
             for step in (0, len(seconds) // 2)}  # fmt: skip
    return [
        pytest.param(first, second, marks=() if (first, second) in quick else pytest.mark.slow)
        for first, seconds in rows.items() for second in seconds
    ]  # fmt: skip


def few(cases: Iterable[Any], step: int) -> list[Any]:
    """Return cases of one value, of which each ``step``-th is quick, from the first on."""
    return [case if at % step == 0 else pytest.param(case, marks=pytest.mark.slow) for at, case in enumerate(cases)]
