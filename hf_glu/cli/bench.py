"""``hf-glu bench``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hf_glu.bench.guard import TOLERANCE, compare, read_results
from hf_glu.bench.options import BENCHES, BenchOptions, check_name
from hf_glu.bench.options import preset as find_preset
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.checkpoint.writing import check_file, user_path
from hf_glu.cli import tables
from hf_glu.cli.commands import Json, app
from hf_glu.cli.exits import EXIT_DIFFERENT
from hf_glu.cli.fields import with_flags
from hf_glu.config.extras import OF_TRAINING, need
from hf_glu.errors import OptionError

if TYPE_CHECKING:
    from hf_glu.bench.running import Cell

# the columns of a bench that claims something
CLAIMED = ["#target", "", "#MB", "#ratio", "#target", ""]


@app.command()
@with_flags(BenchOptions)
def bench(
    given: dict[str, Any],
    name: Annotated[list[str] | None, typer.Argument(help="One or more of: " + ", ".join(BENCHES) + ".")] = None,
    preset: Annotated[str | None, typer.Option(help="8min: what a GPU can tell in eight minutes.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the results to this JSON file, too.")] = None,
    against: Annotated[Path | None, typer.Option(help="Compare the ratios with those of such a file.")] = None,
    tolerance: Annotated[float, typer.Option(help="Share by which a ratio may grow; more is exit code 1.")] = TOLERANCE,
    json: Json = False,
) -> int:
    """Measure claims about speed or memory against their targets."""
    presets: tuple[tuple[str, ...], dict[str, Any]] = find_preset(preset) if preset else ((), {})
    name, given = [*(name or presets[0])], {**presets[1], **given}
    if not name:
        raise OptionError("which bench? one or more of " + ", ".join(BENCHES) + "; or --preset 8min")
    before = read_results(against) if against else None
    for each in name:
        check_name(each)
    if save and not user_path(save).absolute().parent.is_dir():
        raise OptionError(f"--save {save}: there is no folder {save.parent}")
    if save:
        check_file(save)
    options = BenchOptions(**given)
    if "devices" in name and options.task:
        need(*OF_TRAINING, what="bench devices --task")

    from hf_glu.bench.running import run as run_bench

    until = None if options.seconds is None else time.monotonic() + options.seconds
    results: dict[str, Any] = {"benches": []}
    for each in name:
        results["benches"].append(run_bench(each, options, on_cell=_tell, until=until).to_dict())
        if save:  # one that fails later loses nothing
            write_json(user_path(save), results)
    guarded = compare(before, results, tolerance) if before else None
    if guarded:
        results["against"] = guarded.to_dict()
    if save:
        write_json(user_path(save), results)
    tables.emit(results if len(name) > 1 or guarded else results["benches"][0], show_all, json=json)
    lost = any(result.get("failures") for result in results["benches"])
    return EXIT_DIFFERENT if lost or (guarded and not guarded.same) else 0


def show_all(data: tables.Data, console: Console) -> None:
    """Show each bench, then what has changed."""
    for result in data.get("benches", [data]):
        show(result, console)
    if "against" not in data:
        return
    worse = [change for change in data["against"]["changes"] if change["worse"]]
    for change in worse:
        console.print(f"{change['what']}, {change['of']}: {change['before']:.2f} -> {change['now']:.2f}: WORSE")
    console.print(f"{len(worse)} of {len(data['against']['changes'])} ratios have become worse")
    if data["against"]["other_machine"]:
        console.print("the other run is of another processor")


def _tell(cell: Cell) -> None:
    tables.tell("measuring " + describe(cell.shape))


def describe(shape: Mapping[str, Any]) -> str:
    """Return a cell's shape as a line."""
    return ", ".join(str(value) if isinstance(value, str) else f"{key} {value}" for key, value in shape.items())


def show(data: tables.Data, console: Console) -> None:
    """Show a table for each cell: times and saved bytes, with the ratios beside their targets."""
    console.print(", ".join(f"{key} {value}" for key, value in data["machine"].items()))
    cells: dict[str, list[tables.Data]] = {}
    for row in data["rows"]:
        cells.setdefault(describe(row["cell"]), []).append(row)
    for title, rows in cells.items():
        facts = list(dict.fromkeys(fact for row in rows for fact in row["facts"]))
        more = [f"#{fact}" for fact in facts] or CLAIMED
        speed = ["#tokens/s"] if any("tokens_per_second" in row for row in rows) else []
        shown = tables.table(title, "contender", "#ms (quartiles)", *speed, "to", "#ratio (quartiles)", *more)
        for row in rows:
            name, milliseconds, *ratio = _times(row)
            counted = [tables.number(row.get("tokens_per_second"), ",.0f")] if speed else []
            claimed = [_fact(row["facts"].get(fact)) for fact in facts] or _claims(row)
            shown.add_row(name, milliseconds, *counted, *ratio, *claimed)
        console.print(shown)
    for mean in data["means"]:
        verdict = _verdict(mean["met"])
        console.print(
            f"{mean['contender']}: {mean['ratio']:.3f} on the mean of all cells (target {mean['target']}): {verdict}"
        )
    for failure in data.get("failures", ()):
        console.print(f"MISSING: {failure['contender'] or 'all'} of {describe(failure['cell'])}: {failure['why']}")
    if not any(row["facts"] for row in data["rows"]):
        console.print(data["summary"])


def _times(row: tables.Data) -> list[str]:
    ratio = row["ratio"]
    return [row["contender"], _spread(row["seconds"], 1e3), row["peer"] or "-", _spread(ratio) if ratio else "-"]


def _claims(row: tables.Data) -> list[str]:
    saved = row["saved_bytes"]
    return [
        _target(row), _verdict(row["met"]), "-" if saved is None else f"{saved / 1e6:.1f}",
        tables.number(row["saved_ratio"], ".2f"), tables.number(row["saved_target"], ".2f"),
        _verdict(row["saved_met"]),
    ]  # fmt: skip


def _target(row: tables.Data) -> str:
    limits = [] if row["limit"] is None else [f"{row['limit']:g} s"]
    targets = [] if row["target"] is None else [f"{row['target']:.2f}"]
    return ", ".join(targets + limits) or "-"


def _fact(value: float | None) -> str:
    return tables.number(value, ",d" if isinstance(value, int) else ".2f")


def _spread(spread: dict[str, float], unit: float = 1.0) -> str:
    median, low, high = (spread[key] * unit for key in ("median", "low", "high"))
    digits = 1 if median >= 10 else 3
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _verdict(met: bool | None) -> str:
    return "" if met is None else "met" if met else "MISSED"
