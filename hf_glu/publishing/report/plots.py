"""Figures that are no curves: scores of tasks, a comparison of variants, activations per layer.

Each function returns None where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hf_glu.publishing.report.collect import Data, number, numbers
from hf_glu.publishing.report.curves import Points, overlay
from hf_glu.publishing.report.drawing import (
    GRID,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    SERIES,
    Drawing,
    cut,
    draw,
    label_ends,
    name_axes,
)
from hf_glu.publishing.report.formats import percent, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BARS = 12  # bars that have room for their values


def task_scores(name: str, scores: Mapping[str, float | None]) -> Drawing | None:
    """Draw the scores of a suite's tasks as bars; None if there is no score."""
    known = {task: score for task, score in scores.items() if score is not None}
    if not known:
        return None
    factor, unit, form = scale("score", known.values())
    tasks = list(scores)

    def paint(axes: Axes) -> None:
        for row, (_, score) in enumerate(scores.items()):
            value = (score or 0.0) * factor
            axes.barh(row, value, height=0.62, color=SERIES[0])
            label, colour = (form(score), INK) if score is not None else ("no result", MUTED)
            axes.annotate(
                label,
                (max(value, 0.0), row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontsize=10,
            )
        _rows(axes, tasks)
        low, high = axes.get_xlim()
        axes.set_xlim(low, high + 0.16 * (high - low))
        name_axes(axes, f"score{unit}", "")

    shown = ", ".join(f"{task} {'without result' if score is None else form(score)}" for task, score in scores.items())
    return draw(name, "Score of each task", paint, alt=f"Bars: {shown}", height=70 + 24 * len(tasks))


def comparison(name: str, variants: Sequence[Data], label: str, baseline: str | None) -> Drawing | None:
    """Draw the variants' means with error bars, and single seeds as dots.

    The bars are 95 % intervals where all variants have one, else one standard deviation.
    """
    variants = [variant for variant in variants if number(variant.get("mean")) is not None]
    if not variants:
        return None
    seeds = [numbers(variant.get("scores")) for variant in variants]
    values = [value for variant, scores in zip(variants, seeds, strict=True) for value in [_mean(variant), *scores]]
    factor, unit, form = scale(label, values)
    names = [str(variant.get("name")) for variant in variants]
    intervals = [numbers(variant.get("interval")) for variant in variants]
    spreads = [number(variant.get("std")) or 0.0 for variant in variants]
    bars = "one standard deviation"
    if all(intervals):
        bars, spreads = "its 95 % interval", [(high - low) / 2 for low, high in intervals]

    def paint(axes: Axes) -> None:
        for row, variant in enumerate(variants):
            first = names[row] == baseline
            colour, mean = (MUTED if first else SERIES[0]), _mean(variant) * factor
            if first:
                axes.axvline(mean, color=MUTED, lw=1.2, ls=(0, (4, 3)), zorder=1)
            scores = [score * factor for score in seeds[row]]
            axes.plot(scores, [row + 0.2] * len(scores), "o", ms=5, mfc="none", mec=colour, mew=1.2, alpha=0.8)
            axes.errorbar(mean, row, xerr=spreads[row] * factor, fmt="o", color=colour, ms=9, capsize=4, lw=2)
            axes.annotate(
                form(_mean(variant)),
                (mean, row),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color=colour,
                fontsize=10,
                weight="bold",
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
            )
        _rows(axes, names)
        axes.set_ylim(len(names) - 0.4, -0.7)
        name_axes(axes, f"{label}{unit}", "")

    shown = ", ".join(f"{each_name} {form(_mean(each))}" for each_name, each in zip(names, variants, strict=True))
    return draw(
        name,
        "Mean and single seeds",
        paint,
        alt=f"Dots with error bars: {label} of {shown}",
        note=f"Filled: mean, with {bars}. Rings: single seeds. Dashed: the baseline.",
        height=80 + 46 * len(names),
    )


def _mean(variant: Data) -> float:
    return number(variant.get("mean")) or 0.0


def layer_shares(name: str, title: str, series: Mapping[str, Points], *, note: str = "") -> Drawing | None:
    """Draw a share of each layer: one series as bars, several as lines."""
    if len(series) > 1:
        curves = {key: [curve] for key, curve in series.items()}
        return overlay(name, title, curves, x="layer", y="share", note=note, zero=True)
    curve = next(iter(series.values()), [])
    if not curve:
        return None

    def paint(axes: Axes) -> None:
        layers, shares = [x for x, _ in curve], [100 * y for _, y in curve]
        bars = axes.bar(layers, shares, width=0.7, color=SERIES[0])
        if len(curve) <= _BARS:
            axes.bar_label(bars, fmt="{:.1f}", padding=2, fontsize=9.5, color=INK)
        axes.set_ylim(0, max(1.0, 1.15 * max(shares)))
        name_axes(axes, "layer", "share (%)")

    low, high = (choose(curve, key=lambda point: point[1]) for choose in (min, max))
    alt = f"Bars: {title}, from {percent(low[1])} in layer {low[0]:g} to {percent(high[1])} in layer {high[0]:g}"
    return draw(name, title, paint, alt=alt, note=note, height=220)


def gate_inputs(name: str, series: Mapping[str, tuple[Points, Points]]) -> Drawing | None:
    """Draw the means of the gates' pre-activations by layer, with standard deviations as error bars."""
    note = "Dot: mean. Bar: one standard deviation."
    return spreads(name, "Pre-activation of the gates", series, y="pre-activation", note=note)


def spreads(
    name: str, title: str, series: Mapping[str, tuple[Points, Points]], *, y: str, note: str, base: float = 0.0
) -> Drawing | None:
    """Draw means and standard deviations by layer as dots with error bars, and a line at ``base``."""
    series = {key: pair for key, pair in series.items() if pair[0] and len(pair[0]) == len(pair[1])}
    if not series:
        return None
    step = min(0.2, 0.7 / len(series))

    def paint(axes: Axes) -> None:
        axes.axhline(base, color=MUTED, lw=1)
        ends = []
        for index, (key, (means, deviations)) in enumerate(series.items()):
            colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
            aside = step * (index - (len(series) - 1) / 2)
            xs, ys = [x + aside for x, _ in means], [mean for _, mean in means]
            spread = [deviation for _, deviation in deviations]
            axes.errorbar(xs, ys, yerr=spread, fmt=marker, color=colour, ms=7, capsize=3, lw=1.6)
            ends.append((xs[-1], ys[-1], cut(key), colour))
        if len(series) > 1:
            label_ends(axes, ends)
        name_axes(axes, "layer", y)

    found = [mean for means, _ in series.values() for _, mean in means]
    alt = f"Dots with error bars: mean {y} of each layer, {min(found):.4g} to {max(found):.4g}"
    return draw(name, title, paint, alt=alt, note=note, height=220)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a horizontal figure, the first one at its top."""
    axes.set_yticks(range(len(names)), [cut(name) for name in names])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True, color=GRID)
