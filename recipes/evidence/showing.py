"""The results of the studies, and how their numbers are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hf_glu.checkpoint.jsonio import read_object
from hf_glu.errors import DataError

Data = dict[str, Any]
RESULTS = Path(__file__).with_name("results")
NOT_RUN = "not run yet"
TITLES = {
    "gates": "(a) Which gate, from scratch",
    "experts": "(b) Is the inner gate redundant in experts",
    "conversion-tasks": "(c) After conversion: tasks",
    "conversion-text": "(c) After conversion: pretraining goes on",
    "memory-recall": "(d) Memory: recall",
    "memory-hops": "(d) Memory: two hops, asked thrice",
    "memory-text": "(d) Memory: text",
    "modulation-text": "(e) Modulation: text of four domains",
    "modulation-tasks": "(e) Modulation: all tasks at once",
}


def read_results(folder: Path = RESULTS) -> list[Data]:
    """Read the results of all studies, in the order of the claims, the small sizes first.

    Raises:
        DataError: one is of a study that there isn't.
    """
    found = [read_object(path) for path in sorted(folder.glob("*.json"))]
    if unknown := [each["study"] for each in found if each["study"] not in TITLES]:
        raise DataError(f"{folder} has results of {unknown[0]!r}, which is no study")
    return sorted(found, key=lambda each: (list(TITLES).index(each["study"]), _order(each["size"])))


def _order(size: str) -> tuple[float, str]:
    """Return what sizes are sorted by: millions of parameters, then the name."""
    found = re.match(r"([\d.]+)m", size)
    return float(found[1]) if found else 0.0, size


def shown(each: Data, key: str, sign: str = "+") -> str:
    """Return a number of a judged claim as it is shown."""
    value = each[key]
    return "-" if value is None else f"{value * each['factor']:{sign}.{each['digits']}f}"


def bounds(each: Data) -> str:
    """Return the interval of a judged claim as it is shown."""
    if each["interval"] is None:
        return "-"
    return " to ".join(f"{value * each['factor']:+.{each['digits']}f}" for value in each["interval"])


def rate(row: Data) -> str:
    """Return a variant's learning rate as it is shown."""
    return "-" if row.get("lr") is None else f"{row['lr']:g}"


def value_of(value: float | None, percent: bool) -> str:
    """Return a mean or a score as it is shown."""
    if value is None:
        return "diverged"
    return f"{value:.1%}" if percent else f"{value:.4f}"
