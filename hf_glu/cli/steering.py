"""``hf-glu steer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_glu.bench.steering.options import SteerOptions, read_sides
from hf_glu.checkpoint.writing import user_path
from hf_glu.cli import tables
from hf_glu.cli.commands import Json, app
from hf_glu.cli.fields import with_flags
from hf_glu.config.extras import need


@app.command()
@with_flags(SteerOptions)
def steer(
    given: dict[str, Any],
    model: Annotated[str, typer.Argument(help="Causal language model: local folder, Hub id or FILE.gguf.")],
    positive: Annotated[Path, typer.Option(help="File of texts of the target class, a text a line.")],
    negative: Annotated[Path, typer.Option(help="File of texts of the opposite class.")],
    save: Annotated[
        Path | None, typer.Option(help="New folder for the modulation of gates, of the first seed.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this .png, .svg or .pdf file.")] = None,
    json: Json = False,
) -> None:
    """Steer a language model by its gates, and measure dose and response beside a prompt and the residual stream."""
    options = SteerOptions(**given)
    need("sklearn", what="hf-glu steer")
    read_sides(positive, negative)
    from hf_glu.cli.early import check_destinations, check_sources

    check_destinations(save)
    if plot is not None:
        from hf_glu.publishing.report.family import check_plot

        check_plot(plot)
    check_sources(model, *([options.classifier] if options.classifier else []))

    from hf_glu.bench.steering.running import steer as run_steer

    data, made = run_steer(model, positive, negative, options, tables.tell)
    if save is not None:
        made.save(save)
        data["saved"] = str(user_path(save))
    if plot is not None:
        from hf_glu.bench.steering.plotting import plot_doses

        data["plot"] = str(plot_doses(data, plot))
    tables.emit(data, show, json=json)


def show(data: tables.Data, console: Console) -> None:
    """Show the curves of the first seed, and all areas."""
    seed = data["rows"][0]["seed"]
    for row in data["rows"]:
        if row["seed"] == seed:
            console.print(_curve(row))
    shown = tables.table(
        f"Area at equal perplexity, up to {data['budget']:g} times the unsteered model's", "way", "where", "#area",
        "95 % interval", "breaks at",
    )  # fmt: skip
    for each in data["areas"]:
        between = each["interval"]
        shown.add_row(
            each["way"], each["note"], tables.number(each["area"], ".3f") + ("" if each["spent"] else " or more"),
            "-" if between is None else f"{between[0]:.3f} to {between[1]:.3f}",
            ", ".join(f"{strength:g}" for strength in each["breaks"]) or "-",
        )  # fmt: skip
    console.print(shown)
    accuracy = data["judge"]["accuracy"]
    console.print(f"scored by {data['judge']['about']}" + ("" if accuracy is None else f", accuracy {accuracy:.1%}"))
    for each in data["areas"]:
        for strength in each["breaks"]:
            console.print(f"{each['way']}: perplexity is infinite from strength {strength:g} on")
    for path in filter(None, (data["saved"], data["plot"])):
        console.print(path, soft_wrap=True)


def _curve(row: tables.Data) -> Any:
    unit = f", strengths times {row['unit']:g}" if row["unit"] != 1 else ""
    shown = tables.table(
        f"{row['way']}, {row['note']}{unit}", "#strength", "#score", "#own text", "#neutral text", "#cost"
    )
    for point in row["points"]:
        numbers = [tables.number(point[key], ".3g") for key in ("own", "neutral", "cost")]
        shown.add_row(f"{point['strength']:g}", tables.number(point["score"], ".3f"), *numbers)
    return shown
