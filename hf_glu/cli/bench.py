"""``hf-glu bench``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from hf_glu.bench.running import BENCHES, BenchOptions, Cell
from hf_glu.bench.running import run as run_bench
from hf_glu.cli import tables
from hf_glu.cli.commands import Json, app
from hf_glu.cli.fields import with_flags


@app.command()
@with_flags(BenchOptions)
def bench(
    given: dict[str, Any],
    name: Annotated[str, typer.Argument(help="One of: " + ", ".join(BENCHES) + ".")],
    json: Json = False,
) -> None:
    """Measure a claim about speed or memory against its target."""
    result = run_bench(name, BenchOptions(**given), on_cell=_tell)
    tables.emit(result, show, json=json)


def _tell(cell: Cell) -> None:
    console = Console(stderr=True, markup=False, highlight=False)
    console.print("measuring " + describe(cell.shape), style="dim", soft_wrap=True)


def describe(shape: dict[str, Any]) -> str:
    """Return a cell's shape as a line."""
    return ", ".join(str(value) if isinstance(value, str) else f"{key} {value}" for key, value in shape.items())


def show(data: tables.Data, console: Console) -> None:
    """Show a table for each cell: times and saved bytes, with the ratios beside their targets."""
    console.print(", ".join(f"{key} {value}" for key, value in data["machine"].items()))
    cells: dict[str, list[tables.Data]] = {}
    for row in data["rows"]:
        cells.setdefault(describe(row["cell"]), []).append(row)
    for title, rows in cells.items():
        shown = tables.table(
            title, "contender", "#ms (quartiles)", "to", "#ratio (quartiles)", "#target", "", "#MB saved", "#ratio",
            "#target", "",
        )  # fmt: skip
        for row in rows:
            shown.add_row(*_cells(row))
        console.print(shown)
    console.print(data["summary"])


def _cells(row: tables.Data) -> list[str]:
    ratio, saved = row["ratio"], row["saved_bytes"]
    return [
        row["contender"], _spread(row["seconds"], 1e3), row["peer"] or "-", _spread(ratio) if ratio else "-",
        tables.number(row["target"], ".2f"), _verdict(row["met"]), "-" if saved is None else f"{saved / 1e6:.1f}",
        tables.number(row["saved_ratio"], ".2f"), tables.number(row["saved_target"], ".2f"),
        _verdict(row["saved_met"]),
    ]  # fmt: skip


def _spread(spread: dict[str, float], unit: float = 1.0) -> str:
    median, low, high = (spread[key] * unit for key in ("median", "low", "high"))
    digits = 1 if median >= 10 else 3
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _verdict(met: bool | None) -> str:
    return "" if met is None else "met" if met else "MISSED"
