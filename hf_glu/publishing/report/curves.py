"""Curves over training: loss, score on the validation data, and several runs at once.

Each function that draws returns None where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from hf_glu.publishing.report.collect import Data, number
from hf_glu.publishing.report.drawing import MARKERS, MUTED, SERIES, Drawing, cut, draw, label_ends, name_axes
from hf_glu.publishing.report.formats import is_number, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, float]]

_DRAWN = 400  # points of a curve that are drawn: more would not be seen
_MARKED = 24  # points of a curve that get a marker each


def points(lines: Sequence[Data], x: str, y: str) -> Points:
    """Return the log's lines as points, without those that lack one of the two."""
    found = [(number(line.get(x)), number(line.get(y))) for line in lines]
    return [(first, second) for first, second in found if first is not None and second is not None]


def smoothed(curve: Points) -> Points:
    """Return the exponential moving average over about a twentieth of a curve, unbiased at its start."""
    keep = 1 - 2 / (max(1.0, len(curve) / 20) + 1)
    average, weight, result = 0.0, 0.0, []
    for x, y in curve:
        average, weight = keep * average + (1 - keep) * y, keep * weight + (1 - keep)
        result.append((x, average / weight))
    return result


def loss_curve(name: str, curve: Points) -> Drawing | None:
    """Draw a run's training loss, smoothed over raw."""
    if not curve:
        return None
    smooth = smoothed(curve)

    def paint(axes: Axes) -> None:
        axes.plot(*_thin(curve), color=SERIES[0], alpha=0.28, lw=1)
        axes.plot(*_thin(smooth), color=SERIES[0], lw=2.2)
        axes.plot(*smooth[-1], "o", color=SERIES[0])
        label_ends(axes, [(*smooth[-1], f"{smooth[-1][1]:.3f}", SERIES[0])])
        name_axes(axes, "training step", "loss")

    alt = f"Line: training loss over {curve[-1][0]:,.0f} steps, smoothed from {smooth[0][1]:.3f} to {smooth[-1][1]:.3f}"
    return draw(name, "Training loss", paint, alt=alt, note="Thin: as logged. Bold: moving average.")


def score_curve(
    name: str, curve: Points, label: str, before: float | None = None, *, title: str = "Score on the validation data"
) -> Drawing | None:
    """Draw a run's score at each evaluation, with the score before training."""
    if not curve:
        return None
    values = [y for _, y in curve]
    factor, unit, form = scale(label, [*values, before])
    best = min(values) if is_number(label) else max(values)

    def paint(axes: Axes) -> None:
        drawn = [(x, y * factor) for x, y in curve]
        axes.plot(*zip(*drawn, strict=True), "-o", color=SERIES[2], lw=2.2)
        ends = [(*drawn[-1], form(values[-1]), SERIES[2])]
        if before is not None:
            axes.axhline(before * factor, color=MUTED, lw=1.2, ls=(0, (4, 3)))
            ends.append((drawn[-1][0], before * factor, "before", MUTED))
        label_ends(axes, ends)
        name_axes(axes, "training step", f"{cut(label, 32)}{unit}")

    alt = f"Line: {label} at {len(curve)} evaluations, from {form(values[0])} to {form(values[-1])}, best {form(best)}"
    note = "" if before is None else "Dashed: before training."
    return draw(name, title, paint, alt=alt, note=note)


def overlay(
    name: str,
    title: str,
    series: Mapping[str, Sequence[Points]],
    *,
    x: str,
    y: str,
    note: str = "",
    zero: bool = False,
    plain: str = "",
    level: float | None = None,
) -> Drawing | None:
    """Draw named curves; of those that share a name, the mean is bold and each one a thin line.

    ``zero``: the axis of y starts there. ``plain``: the format of y, where that is no metric. ``level``: of a dashed
    line.
    """
    series = {key: kept for key, curves in series.items() if (kept := [curve for curve in curves if curve])}
    means = {key: averaged(curves) for key, curves in series.items()}
    if not means:
        return None
    factor, unit, form = scale(y, [value for curves in series.values() for curve in curves for _, value in curve])
    if plain:
        factor, unit, form = 1.0, "", lambda value: format(value, plain)

    def paint(axes: Axes) -> None:
        ends = []
        for index, (key, mean) in enumerate(means.items()):
            colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
            for curve in series[key] if len(series[key]) > 1 else ():
                axes.plot(*_thin(curve, factor), color=colour, lw=0.8, alpha=0.35)
            shown = marker if len(mean) <= _MARKED else None
            axes.plot(*_thin(mean, factor), color=colour, lw=2, marker=shown)
            ends.append((mean[-1][0], mean[-1][1] * factor, cut(key), colour))
        if level is not None:
            axes.axhline(level * factor, color=MUTED, lw=1.2, ls=(0, (4, 3)))
        if zero:
            axes.set_ylim(0, max(0.0 if plain else 1.0, axes.get_ylim()[1]))
        label_ends(axes, ends)
        name_axes(axes, x, f"{y}{unit}")

    finals = ", ".join(f"{key} {form(mean[-1][1])}" for key, mean in means.items())
    return draw(name, title, paint, alt=f"Lines: {y} by {x}; at the end {finals}", note=note)


def averaged(curves: Sequence[Points]) -> Points:
    """Return the mean of curves at the points that all of them have; the longest curve if there are none."""
    at = [dict(curve) for curve in curves]
    shared = [x for x in at[0] if all(x in values for values in at)]
    return [(x, fmean(values[x] for values in at)) for x in shared] or max(curves, key=len)


def _thin(curve: Points, factor: float = 1.0) -> tuple[list[float], list[float]]:
    """Return x and y (times ``factor``) of at most `_DRAWN` points, the last one among them."""
    step = -(-len(curve) // _DRAWN)
    kept = curve[::-1][::step][::-1]
    return [x for x, _ in kept], [factor * y for _, y in kept]
