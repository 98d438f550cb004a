"""Trained activations in a report: curves, mix weights, thresholds and slopes by layer and type of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

from hf_glu.publishing.report.collect import Data, items, mapping, number, numbers
from hf_glu.publishing.report.curves import overlay, points
from hf_glu.publishing.report.drawing import MUTED, SERIES, Drawing, draw_panels
from hf_glu.publishing.report.experts import layer_name
from hf_glu.publishing.report.formats import count, formatted, text
from hf_glu.publishing.report.heat import heat_map
from hf_glu.publishing.report.plots import spreads
from hf_glu.publishing.report.table import Table, TableCell, filled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALL = "all texts"
Curve = dict[str, list[float]]
_FULL = 0.05  # smaller changes of a weight than this stay pale
_MOVED = {"threshold": 0.0, "slope": 1.0}  # -> what it is without a modulation


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


def figures(name: str, rows: Sequence[Data]) -> list[Drawing | None]:
    """Draw the activations of one group."""
    known = {_title(row): curve for row in rows if (curve := _curve(row))}
    moved = {layer: change for layer, curve in known.items() if (change := _change(curve))}
    return [
        _panels(f"{name} curves", "Learned activations", known, "Value at a pre-activation g, where u = 1."),
        _panels(f"{name} changes", "What training changed", moved, "After training less before."),
        *_mixes(f"{name} mix", rows),
        *(_spread(f"{name} {key}", key, rows) for key in _MOVED),
        *(_apart(f"{name} {key} by type", key, rows) for key in _MOVED),
    ]


def _title(row: Data) -> str:
    name = layer_name(row)
    return f"layer {name}" if name.isdecimal() else name


def tables(rows: Sequence[Data]) -> list[Table]:
    """Return the tables with the numbers of one group."""
    return [_changes(rows), _weights(rows), _modulation(rows)]


def _curve(row: Data) -> Curve:
    """Return a row's curves that have a value at each point of the grid; none if the present one hasn't."""
    found = {key: numbers(values) for key, values in mapping(row.get("curve")).items()}
    grid = found.get("g") or []
    found = {key: values for key, values in found.items() if len(values) == len(grid)}
    return found if grid and "after" in found else {}


def _change(curve: Curve) -> Curve:
    """Return curves less the one before training; none if that isn't known."""
    if "before" not in curve:
        return {}
    return {"g": curve["g"]} | {
        key: [new - old for new, old in zip(curve[key], curve["before"], strict=True)]
        for key in ("after", "low", "high")
        if key in curve
    }


def _panels(name: str, title: str, curves: dict[str, Curve], note: str) -> Drawing | None:
    """Draw a small figure of each layer's curves."""
    if not curves:
        return None

    def painter(curve: Curve) -> Callable[[Axes], None]:
        def paint(axes: Axes) -> None:
            axes.axvline(0, color=MUTED, lw=0.7)
            axes.axhline(0, color=MUTED, lw=0.7)
            axes.set_xticks([curve["g"][0] / 2, 0, curve["g"][-1] / 2])  # clear of the neighbours' ones
            if "low" in curve and "high" in curve:
                axes.fill_between(curve["g"], curve["low"], curve["high"], color=SERIES[0], alpha=0.25, lw=0)
            axes.plot(curve["g"], curve["after"], color=SERIES[0], lw=2)
            if "before" in curve:
                axes.plot(curve["g"], curve["before"], color=SERIES[1], lw=1.3, ls=(0, (3, 3)))

        return paint

    values = [value for curve in curves.values() for value in curve["after"]]
    if any("before" in curve for curve in curves.values()):
        note += " Blue: after training. Orange, dashed: before."
    if any("low" in curve for curve in curves.values()):
        note += " Area: 80% of the channels lie in it."
    return draw_panels(
        name,
        title,
        {layer: painter(curve) for layer, curve in curves.items()},
        note=note,
        alt=f"Curves of {len(curves)} layers: {title}, from {min(values):.3g} to {max(values):.3g}",
    )


class Mix(TypedDict):
    """The weights of a mix's functions before and after training, and how far those of tokens are apart."""

    functions: list[str]
    before: list[float] | None
    after: list[float]
    spread: list[float] | None


def _mix(row: Data) -> Mix | None:
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


def _mixes(name: str, rows: Sequence[Data]) -> list[Drawing | None]:
    """Draw heat maps of the weights of mixes, and of their spread over tokens."""
    known = [(layer_name(row), mix) for row in rows if (mix := _mix(row))]
    known = [(layer, mix) for layer, mix in known if mix["functions"] == known[0][1]["functions"]]
    if not known:
        return []
    names = known[0][1]["functions"]
    values, before = [mix["after"] for _, mix in known], [mix["before"] or mix["after"] for _, mix in known]
    changes = [new - old for mix, rest in zip(values, before, strict=True) for new, old in zip(mix, rest, strict=True)]
    spread = [(layer, mix["spread"]) for layer, mix in known if mix["spread"]]
    weights = heat_map(
        name,
        "Mix weights (%)",
        [layer for layer, _ in known],
        names,
        values,
        middle=0.0,
        full=_FULL,
        y="layer",
        alt=f"Heat map: weight of each function by layer; training changed them by {min(changes):+.3f} to "
        f"{max(changes):+.3f}",
        middles=before,
        note="Mean over tokens and channels. No colour: as before training. Orange: more. Blue: less.",
    )
    if not spread:
        return [weights]
    most = max(value for _, found in spread for value in found)
    return [
        weights,
        heat_map(
            f"{name} spread",
            "Spread of the mix weights (%)",
            [layer for layer, _ in spread],
            names,
            [found for _, found in spread],
            middle=0.0,
            full=_FULL,
            y="layer",
            alt=f"Heat map: how far the weights of tokens are apart by layer and function, up to {most:.3f}",
            note="One standard deviation over tokens and channels. No colour: all have the same weights.",
        ),
    ]


def _modulated(rows: Sequence[Data]) -> list[tuple[str, Data]]:
    """Return pairs of a type of text, and thresholds and slopes of a layer."""
    return [
        (text(each.get("type")) or ALL, {**each, "layer": row.get("layer"), "name": layer_name(row)})
        for row in rows
        for each in items(row.get("modulation"))
    ]


def _by_type(rows: Sequence[Data]) -> dict[str, list[Data]]:
    """Group thresholds and slopes by type of text; all texts are one type if there are no others."""
    found: dict[str, list[Data]] = {}
    for name, each in _modulated(rows):
        found.setdefault(name, []).append(each)
    return {name: each for name, each in found.items() if name != ALL} or found


def _spread(name: str, key: str, rows: Sequence[Data]) -> Drawing | None:
    series = {
        kind: (points(found, "layer", key), points(found, "layer", f"{key}_spread"))
        for kind, found in _by_type(rows).items()
    }
    note = "Dot: mean over a layer's channels. Bar: one standard deviation. Line: no modulation."
    return spreads(name, f"{key.capitalize()}s by text type", series, y=key, base=_MOVED[key], note=note)


def _apart(name: str, key: str, rows: Sequence[Data]) -> Drawing | None:
    series = {kind: [points(found, "layer", f"{key}_apart")] for kind, found in _by_type(rows).items()}
    note = "Distance to the mean of all texts: root mean square over a layer's channels."
    title = f"How far text types move {key}s"
    return overlay(name, title, series, x="layer", y="distance", plain=".3g", zero=True, note=note)


def _changes(rows: Sequence[Data]) -> Table:
    cells: list[list[TableCell]] = []
    for row in rows:
        change = _change(_curve(row))
        size, at = max(zip(map(abs, change["after"]), change["g"], strict=True)) if change else (None, None)
        cells.append(
            [
                layer_name(row),
                text(row.get("activation")),
                formatted(size, ".4f"),
                formatted(at, "+.1f"),
                text(row.get("site")),
            ]
        )
    columns = ["layer", "activation", "#largest change", "#at g", "module"]
    return filled("Learned activations", columns, cells, "Largest difference of the curve to the one before training.")


def _weights(rows: Sequence[Data]) -> Table:
    known = [(layer_name(row), mix) for row in rows if (mix := _mix(row))]
    names = list(dict.fromkeys(name for _, mix in known for name in mix["functions"]))
    cells: list[list[TableCell]] = []
    for layer, mix in known:
        after = dict(zip(mix["functions"], mix["after"], strict=True))
        before = dict(zip(mix["functions"], mix["before"] or [], strict=False))
        spread = dict(zip(mix["functions"], mix["spread"] or [], strict=False))
        cells.append([layer, *(_weight(before.get(name), after.get(name), spread.get(name)) for name in names)])
    note = "Before training → after it, mean over tokens and channels; ± one standard deviation where those differ."
    return filled("Mix weights", ["layer", *(f"#{name}" for name in names)], cells, note)


def _weight(before: float | None, after: float | None, spread: float | None) -> str | None:
    if after is None:
        return None
    shown = f"{after:.3f}" if before is None else f"{before:.3f} → {after:.3f}"
    return shown if spread is None else f"{shown} ± {spread:.3f}"


def _modulation(rows: Sequence[Data]) -> Table:
    cells: list[list[TableCell]] = [
        [
            text(each["name"]),
            kind,
            count(each.get("texts")),
            *(formatted(number(each.get(key + end)), ".4g") for key in _MOVED for end in ("", "_spread", "_apart")),
        ]
        for kind, each in _modulated(rows)
    ]
    columns = ["layer", "texts", "#number", *(f"#{key}{end}" for key in _MOVED for end in ("", " ±", ", distance"))]
    note = (
        "Mean over channels after a text's last token, and their standard deviation (±). Distance: root mean square "
        "over channels of the difference to all texts."
    )
    return filled("Thresholds and slopes by text type", columns, cells, note)
