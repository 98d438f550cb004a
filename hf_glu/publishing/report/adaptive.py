"""Trained activations in a report, as figures: curves, mix weights, thresholds and slopes by layer and type of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hf_glu.publishing.report.adaptive_rows import MOVED, Curve, by_type, change_of, curve_of, mix_of
from hf_glu.publishing.report.collect import Data
from hf_glu.publishing.report.curves import overlay, points
from hf_glu.publishing.report.drawing import MUTED, SERIES, Drawing, draw_panels
from hf_glu.publishing.report.experts import layer_name
from hf_glu.publishing.report.heat import heat_map
from hf_glu.publishing.report.plots import spreads

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FULL = 0.05  # smaller changes of a weight than this stay pale


def figures(name: str, rows: Sequence[Data]) -> list[Drawing | None]:
    """Draw the activations of one group."""
    known = {_title(row): curve for row in rows if (curve := curve_of(row))}
    moved = {layer: change for layer, curve in known.items() if (change := change_of(curve))}
    return [
        _panels(f"{name} curves", "Learned activations", known, "Value at a pre-activation g, where u = 1."),
        _panels(f"{name} changes", "What training changed", moved, "After training less before."),
        *_mixes(f"{name} mix", rows),
        *(_spread(f"{name} {key}", key, rows) for key in MOVED),
        *(_apart(f"{name} {key} by type", key, rows) for key in MOVED),
    ]


def _title(row: Data) -> str:
    name = layer_name(row)
    return f"layer {name}" if name.isdecimal() else name


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


def _mixes(name: str, rows: Sequence[Data]) -> list[Drawing | None]:
    """Draw heat maps of the weights of mixes, and of their spread over tokens."""
    known = [(layer_name(row), mix) for row in rows if (mix := mix_of(row))]
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


def _spread(name: str, key: str, rows: Sequence[Data]) -> Drawing | None:
    series = {
        kind: (points(found, "layer", key), points(found, "layer", f"{key}_spread"))
        for kind, found in by_type(rows).items()
    }
    note = "Dot: mean over a layer's channels. Bar: one standard deviation. Line: no modulation."
    return spreads(name, f"{key.capitalize()}s by text type", series, y=key, base=MOVED[key], note=note)


def _apart(name: str, key: str, rows: Sequence[Data]) -> Drawing | None:
    series = {kind: [points(found, "layer", f"{key}_apart")] for kind, found in by_type(rows).items()}
    note = "Distance to the mean of all texts: root mean square over a layer's channels."
    title = f"How far text types move {key}s"
    return overlay(name, title, series, x="layer", y="distance", plain=".3g", zero=True, note=note)
