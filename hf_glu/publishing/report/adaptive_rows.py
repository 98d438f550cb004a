"""What trained activations have become, read from a run's results: curves, mixes, thresholds and slopes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypedDict

from hf_glu.publishing.report.collect import Data, items, mapping, numbers
from hf_glu.publishing.report.experts import layer_name
from hf_glu.publishing.report.formats import text

ALL = "all texts"
Curve: TypeAlias = dict[str, list[float]]
MOVED = {"threshold": 0.0, "slope": 1.0}  # -> what it is without a modulation


def by_place(rows: Sequence[Data]) -> dict[str, list[Data]]:
    """Group rows that differ in their layer only, under names such as ``encoder, modulated_swiglu``.

    Where a layer has several activations (its experts'), their path in it is added.
    """
    places: dict[tuple[str, str, str], list[Data]] = {}
    for row in rows:
        parts = (text(row.get("site")) or "").split(".")
        layer = next((at for at, part in enumerate(parts) if part.isdigit()), -1)
        place = (text(row.get("stack")) or "", text(row.get("activation")) or "", ".".join(parts[layer + 1 :]))
        places.setdefault(place, []).append(row)
    alike = [place[:2] for place in places]
    return {
        ", ".join(filter(None, place if alike.count(place[:2]) > 1 else place[:2])): found
        for place, found in places.items()
    }


def curve_of(row: Data) -> Curve:
    """Return a row's curves that have a value at each point of the grid; none if the present one hasn't."""
    found = {key: numbers(values) for key, values in mapping(row.get("curve")).items()}
    grid = found.get("g") or []
    found = {key: values for key, values in found.items() if len(values) == len(grid)}
    return found if grid and "after" in found else {}


def change_of(curve: Curve) -> Curve:
    """Return curves less the one before training; none if that isn't known."""
    if "before" not in curve:
        return {}
    return {"g": curve["g"]} | {
        key: [new - old for new, old in zip(curve[key], curve["before"], strict=True)]
        for key in ("after", "low", "high")
        if key in curve
    }


class Mix(TypedDict):
    """The weights of a mix's functions before and after training, and how far those of tokens are apart."""

    functions: list[str]
    before: list[float] | None
    after: list[float]
    spread: list[float] | None


def mix_of(row: Data) -> Mix | None:
    """Return the mix of a row, its lists as long as that of its functions; None where there is none."""
    mix = mapping(row.get("mix"))
    names = mix.get("functions")
    if not isinstance(names, list) or not names or len(numbers(mix.get("after"))) != len(names):
        return None
    before, spread = (
        found if len(found := numbers(mix.get(key))) == len(names) else None for key in ("before", "spread")
    )
    functions = [str(name) for name in names]
    return {"functions": functions, "before": before, "after": numbers(mix.get("after")), "spread": spread}


def modulated(rows: Sequence[Data]) -> list[tuple[str, Data]]:
    """Return pairs of a type of text, and thresholds and slopes of a layer."""
    return [
        (text(each.get("type")) or ALL, {**each, "layer": row.get("layer"), "name": layer_name(row)})
        for row in rows
        for each in items(row.get("modulation"))
    ]


def by_type(rows: Sequence[Data]) -> dict[str, list[Data]]:
    """Group thresholds and slopes by type of text; all texts are one type if there are no others."""
    found: dict[str, list[Data]] = {}
    for name, each in modulated(rows):
        found.setdefault(name, []).append(each)
    return {name: each for name, each in found.items() if name != ALL} or found
