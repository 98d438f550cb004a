"""Drawing figures as PNG, and as SVG that takes its colours from the page, narrow enough for a phone.

The SVG keeps its text as text. Its colours become CSS variables, so that the page's dark scheme recolours it, and its
ids get the figure's name, so that they stay unique in the page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_glu.config.extras import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE = 0.085  # height of a label, as a share of an axes'
WIDTH = 390  # points, which are the SVG's units
_SCREEN = 800  # a higher figure scrolls
_PANEL = 95  # points of a row of small figures
INK, MUTED, GRID, PAPER = "#1c2430", "#5d6776", "#dfe3e8", "#fdfefe"
# told apart by the colour-blind, too (after Okabe and Ito), each 4.5:1 on white, for labels
SERIES = ("#0067a8", "#c04a00", "#007a5a", "#a3397a", "#7a6200", "#4a5a9a")
MARKERS = ("o", "s", "^", "D", "v", "P")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    colour: f"series-{index}" for index, colour in enumerate(SERIES)
}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_glu",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 11.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.xmargin": 0.03,
    "axes.unicode_minus": False,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "lines.markeredgecolor": PAPER,
    "lines.markeredgewidth": 0.8,
    "lines.markersize": 6.5,
}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure, as SVG and as PNG.

    Attributes:
        name: of its PNG file, unique in a report.
        alt: what it shows, for those who can't see it.
        note: how to read it.
        svg: for the page.
        png: for the file.
    """

    name: str
    alt: str
    note: str
    svg: str
    png: bytes


def require_matplotlib() -> None:
    """Raise MissingPackageError where matplotlib isn't installed."""
    need("matplotlib", what="a figure")


def draw(
    name: str,
    title: str,
    paint: Callable[[Axes], None],
    *,
    alt: str,
    note: str = "",
    height: float = 250,
    width: float = WIDTH,
) -> Drawing:
    """Draw a figure of one axes by ``paint``; one larger than a screen scrolls in a box of its own.

    Raises:
        MissingPackageError: matplotlib isn't installed.
    """
    return _draw(name, title, lambda figure: paint(figure.add_subplot()), alt, note, height, width)


def draw_panels(
    name: str, title: str, panels: Mapping[str, Callable[[Axes], None]], *, alt: str, note: str = "", columns: int = 3
) -> Drawing:
    """Draw small figures with the same axes side by side, each with its own title.

    Raises:
        MissingPackageError: matplotlib isn't installed.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)

    def paint(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, (label, paint_panel) in zip(grid, panels.items(), strict=False):
            paint_panel(axes)
            axes.set_title(cut(label, 44 // columns), loc="left", fontsize=10, color=INK, pad=3)
            axes.tick_params(labelsize=9, length=0)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes in grid[max(0, len(panels) - columns) : len(panels)]:
            axes.tick_params(labelbottom=True)  # above an empty place, too

    return _draw(name, title, paint, alt, note, 60 + rows * _PANEL, WIDTH)


def _draw(
    name: str, title: str, paint: Callable[[Figure], None], alt: str, note: str, height: float, width: float
) -> Drawing:
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    name = slug(name)
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        figure.suptitle(title, x=0.0, ha="left", size=13, weight="bold")
        paint(figure)
        engine = figure.get_layout_engine()
        assert engine is not None
        engine.execute(figure)
        figure.set_layout_engine("none")  # once is enough for both files
        svg = _inline(_save(figure, "svg"), name)
        if width > WIDTH or height > _SCREEN:
            svg = f'<div class="scroll">{svg.replace("<svg ", f"""<svg style="min-width: {width:.0f}px" """, 1)}</div>'
        return Drawing(name=name, alt=alt, note=note, svg=svg, png=_save(figure, "png"))


def slug(text: str) -> str:
    """Return ``text`` as a name for a file and an id."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-") or "figure"


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write (x, y, text, colour) at the right of the ends of lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    ends = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, y, _, _ in ends:
        heights.append(max((y - low) / (high - low), heights[-1] + _LINE if heights else 0.0))
    ceiling = 1.0
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], ceiling)
        ceiling = heights[place] - _LINE
    for (x, y, label, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            label,
            (x, y),
            xytext=(1.05, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=10.5,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "alpha": 0.55, "shrinkA": 0},
            annotation_clip=False,
        )


def name_axes(axes: Axes, x: str, y: str) -> None:
    """Name the axes, and let layers and steps have whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if x in ("layer", "training step"):
        axes.xaxis.set_major_locator(MaxNLocator(6 if x == "training step" else 12, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")


def cut(name: str, letters: int = 22) -> str:
    """Return the beginning of a name, where it is longer than there is room for."""
    return name if len(name) <= letters else name[: letters - 2] + ".."


def _save(figure: Figure, form: str) -> bytes:
    buffer = io.BytesIO()
    options: dict[str, Any] = (
        {"transparent": True, "metadata": {"Date": None}} if form == "svg" else {"dpi": 160, "bbox_inches": "tight"}
    )
    figure.savefig(buffer, format=form, **options)
    return buffer.getvalue()


def _inline(svg: bytes, name: str) -> str:
    """Return matplotlib's SVG file as an element for the page."""
    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", text, flags=re.DOTALL)
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    body = re.sub(r'\b(id="|xlink:href="#|href="#|url\(#)', lambda found: found[1] + name + "-", body)
    body = body.replace("xlink:href", "href")
    body = re.sub(r" font-family: [^;\"]*;| transform=\"rotate\(-0 [^\"]*\"", "", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    return f'<svg {box[0]} aria-hidden="true" focusable="false">{body}'
