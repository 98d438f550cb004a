"""Heat maps: the farther a value is from the middle, the stronger is its cell's colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_glu.publishing.report.drawing import GRID, INK, SERIES, WIDTH, Drawing, cut, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LESS, MORE = SERIES[0], SERIES[1]
STRONGEST = 0.5  # opacity of the largest deviation: the ink of a cell's number stays readable on it
_NUMBERED = 10  # columns that have room for numbers
_UPRIGHT = 4  # columns that have room for their names
_BRIEF = 3  # letters of a name that any column has room for
_ROW, _COLUMN = 26, 24  # points
_TALL = 20  # rows after which the columns are named above, too

Values = Sequence[Sequence[float | None]]


def heat_map(
    name: str,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Values,
    *,
    middle: float,
    full: float,
    alt: str,
    note: str,
    x: str = "",
    y: str = "",
    middles: Values | None = None,
) -> Drawing:
    """Draw shares as coloured cells; a cell without a value stays empty.

    Args:
        name, title, alt, note: of the figure.
        rows, columns: their names.
        values: of each row, by column.
        middle: the value without colour; ``middles``: each cell's own.
        full: the least distance from it that has the strongest colour.
        x, y: what the columns and rows are.
    """
    cells = [
        (across, down, value)
        for down, row in enumerate(values)
        for across, value in enumerate(row)
        if value is not None
    ]
    shades = [value - ((middles[down][across] or 0.0) if middles else middle) for across, down, value in cells]
    span = max([full, *map(abs, shades)])

    def paint(axes: Axes) -> None:
        _paint_cells(axes, [(*cell[:2], shade / span) for cell, shade in zip(cells, shades, strict=True)])
        if len(columns) <= _NUMBERED:
            for across, down, value in cells:
                axes.annotate(f"{100 * value:.1f}", (across, down), ha="center", va="center", color=INK, fontsize=9)
        _name_cells(axes, rows, columns)
        axes.set_xlabel(x)
        axes.set_ylabel(y)

    width = max(WIDTH, 150 + _COLUMN * len(columns))
    return draw(name, title, paint, alt=alt, note=note, height=100 + _ROW * len(rows), width=width)


def _name_cells(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Write the names of rows and columns beside the cells; long names of many columns are slanted."""
    axes.set_xticks(range(len(columns)), [cut(each, 16) for each in columns], fontsize=9.5)
    if len(columns) > _UPRIGHT and max(map(len, columns)) > _BRIEF:
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [cut(each) for each in rows])
    axes.set_xlim(-0.55, len(columns) - 0.45)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.tick_params(length=0, labeltop=len(rows) > _TALL)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)


def _paint_cells(axes: Axes, cells: Sequence[tuple[int, int, float]]) -> None:
    """Paint cells (column, row, deviation from -1 to 1) as two artists; one for each cell would be slow."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba
    from matplotlib.transforms import AffineDeltaTransform

    square = [(-0.48, -0.46), (0.48, -0.46), (0.48, 0.46), (-0.48, 0.46)]
    coloured = [cell for cell in cells if cell[2]]
    fills = [to_rgba(MORE if value > 0 else LESS, STRONGEST * abs(value)) for _, _, value in coloured]
    filled: dict[str, Any] = {"facecolors": fills, "lw": 0}
    framed: dict[str, Any] = {"facecolors": "none", "edgecolors": GRID, "lw": 0.8}
    for found, style in ((coloured, filled), (cells, framed)):
        if not found:  # matplotlib before 3.11 can't draw a collection of nothing
            continue
        painted = PolyCollection(
            [square],
            offsets=[cell[:2] for cell in found],
            offset_transform=axes.transData,
            transform=AffineDeltaTransform(axes.transData),  # type: ignore[arg-type]
            clip_on=False,
            in_layout=False,
            **style,
        )
        axes.add_collection(painted, autolim=False)
