"""The figure of ``hf-glu steer``: what each way gains, against what it costs."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_glu.publishing.report.drawing import INK, MARKERS, MUTED, SERIES, STYLE
from hf_glu.publishing.report.family import check_plot
from hf_glu.publishing.report.page import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (9.0, 4.2)  # inches
LIMIT = 1.6  # of the axis of perplexity, as a power of the budget


def plot_doses(data: Mapping[str, Any], path: Path) -> Path:
    """Draw the curves of the first seed: scores by strength, and scores by perplexity; return the file's path.

    Raises:
        OptionError, CheckpointError: the file can't be written.
        MissingPackageError: matplotlib isn't installed.
    """
    target = check_plot(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    seed = data["rows"][0]["seed"]
    rows = [row for row in data["rows"] if row["seed"] == seed]
    buffer = io.BytesIO()
    with rc_context(STYLE | {"svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=SIZE, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for at, row in enumerate(rows):
            _paint(left, right, row, SERIES[at % len(SERIES)], MARKERS[at % len(MARKERS)])
        left.set(xlabel="strength, in each way's units", ylabel="score of the target")
        right.set(xlabel="perplexity, times the unsteered model's", xscale="log")
        right.set_xlim(0.97, data["budget"] ** LIMIT)
        ticks = [data["budget"] ** power for power in (0, 0.5, 1, 1.5)]
        right.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        right.xaxis.set_minor_locator(NullLocator())
        right.axvline(data["budget"], color=MUTED, lw=1, ls=(0, (4, 3)))
        left.legend(frameon=False, fontsize=8)
        figure.suptitle("Dose and response", x=0.01, ha="left", size=12, weight="bold", color=INK)
        figure.savefig(buffer, format=target.suffix[1:].lower(), dpi=160)
    return write_file(target, buffer.getvalue())


def _paint(left: Axes, right: Axes, row: Mapping[str, Any], colour: str, marker: str) -> None:
    points = [point for point in row["points"] if point["cost"] != float("inf")]
    scores = [point["score"] for point in points]
    style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 5, "lw": 1.6}
    left.plot([point["strength"] for point in points], scores, label=f"{row['way']} (x {row['unit']:g})", **style)
    right.plot([point["cost"] for point in points], scores, **style)
