"""A figure of many activations: a small panel for each, its name above and its equation below."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from hf_glu.checkpoint.writing import check_file, user_path
from hf_glu.errors import CheckpointError, OptionError
from hf_glu.publishing.report.drawing import INK, MUTED, SERIES, STYLE, require_matplotlib
from hf_glu.publishing.report.page import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")
_COLUMNS, _WIDTH, _HEIGHT = 5, 12.0, 2.25  # panels a row, and inches of a row
_LETTERS = 38  # of a line of an equation
_WINDOW = (-2.2, 4.4)  # the same in all panels, so that they can be compared
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The panel of one activation.

    Attributes:
        name, equation: of it.
        g: where its values are.
        lines: values at ``g``, by label; one line has none.
    """

    name: str
    equation: str
    g: Sequence[float]
    lines: Mapping[str, Sequence[float]]


def write_family(make: Callable[[], Sequence[Sequence[Panel]]], path: Path) -> Path:
    """Draw panels into a PNG, SVG or PDF file, as its suffix says; return its path.

    Args:
        make: makes the panels, once all else is known to be right; each list of them begins a row.
        path: of the file.

    Raises:
        OptionError: another suffix, or the file can't be written.
        MissingPackageError: matplotlib isn't installed.
    """
    target = check_plot(path)
    content = _draw(make(), target.suffix[1:].lower())
    try:
        return write_file(target, content)
    except CheckpointError as error:
        raise OptionError(str(error)) from error


def check_plot(path: Path) -> Path:
    """Return where a plot goes, before anything is drawn.

    Raises:
        OptionError, CheckpointError: another suffix, or the file can't be written.
        MissingPackageError: matplotlib isn't installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"a plot is written to a file with the suffix {', '.join(SUFFIXES)}, got {str(path)!r}")
    require_matplotlib()
    target = user_path(path)
    if not target.parent.is_dir():
        raise OptionError(f"{path} can't be written: there is no folder {target.parent}")
    check_file(target)
    return target


def _draw(groups: Sequence[Sequence[Panel]], form: str) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    places: list[Panel | None] = []
    for group in groups:
        places += [*group, *([None] * (-len(group) % _COLUMNS))]
    rows = len(places) // _COLUMNS
    buffer = io.BytesIO()
    with rc_context(STYLE | {"svg.fonttype": "path", "font.size": 9}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks
        figure = Figure(figsize=(_WIDTH, 0.5 + rows * _HEIGHT), layout="constrained")
        figure.suptitle("Activations: value at the gate g, with u = 1", x=0.005, ha="left", size=13, weight="bold")
        grid = figure.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, panel in zip(grid, places, strict=True):
            _paint(axes, panel) if panel is not None else axes.set_axis_off()
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
        figure.savefig(buffer, format=form, dpi=200, metadata=metadata)
    return buffer.getvalue()


def _paint(axes: Axes, panel: Panel) -> None:
    axes.axhline(0, color=MUTED, lw=0.6)
    axes.axvline(0, color=MUTED, lw=0.6)
    for at, (label, values) in enumerate(panel.lines.items()):
        style = {"color": SERIES[at % len(SERIES)], "ls": _DASHES[at % len(_DASHES)]}
        axes.plot(panel.g, values, label=label, lw=1.8 if at else 2.2, **style)
    axes.set_title(panel.name, loc="left", fontsize=10.5, weight="bold", color=INK, pad=4)
    axes.set_xlabel(fill(panel.equation, _LETTERS), loc="left", fontsize=8.5, color=MUTED)
    axes.tick_params(labelsize=8, length=0, labelbottom=True, labelleft=True)
    axes.set(ylim=_WINDOW, xticks=(-4, -2, 0, 2, 4))
    if len(panel.lines) > 1:
        axes.legend(loc="upper left", frameon=False, fontsize=7.5, labelspacing=0.15, handlelength=2.2, borderpad=0.1)
