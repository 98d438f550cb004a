"""``hf-glu sparsify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_glu.checkpoint.folders import staged_folder
from hf_glu.checkpoint.loading import read_texts
from hf_glu.cli import tables
from hf_glu.cli.commands import Exclude, Json, Layers, app
from hf_glu.config.sparsity import METHODS, check_sparsity
from hf_glu.errors import OptionError


@app.command()
def sparsify(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint: local folder, Hub id or FILE.gguf.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New folder.")],
    calibration: Annotated[Path, typer.Option(help="Text file, a text a line, that thresholds are made on.")],
    keep: Annotated[float, typer.Option(help="Share of the FFNs' weights that a token reads.")] = 0.7,
    method: Annotated[str, typer.Option(help="What counts: " + ", ".join(METHODS) + ".")] = "wina",
    layers: Layers = None,
    exclude: Exclude = None,
    json: Json = False,
) -> None:
    """Make the FFNs of a model leave small entries out, so that decoding reads fewer weights, and say what it costs."""
    from hf_glu.cli import early

    check_sparsity(method, keep)
    if keep == 1:
        raise OptionError("--keep 1 leaves nothing out: give less than 1")
    early.check_conversion(None, layers=layers, exclude=exclude)
    texts = read_texts(calibration)
    early.check_destinations(destination)
    early.check_sources(source)

    from hf_glu.checkpoint.sparse import sparsify_checkpoint
    from hf_glu.publishing.card.card import write_card

    with staged_folder(destination) as stage:  # with its card, or not at all
        report = sparsify_checkpoint(source, stage, texts, keep=keep, method=method, layers=layers, exclude=exclude)
        write_card(stage, repo_id=destination.absolute().name)
    tables.emit(report, show, json=json)


def show(data: tables.Data, console: Console) -> None:
    """Show what each FFN leaves out, and what that costs."""
    title = f"{len(data['sites'])} FFNs, {data['method']}"
    shown = tables.table(title, "site", "#inputs kept", "#units kept", "#relative error")
    for site in data["sites"]:
        shown.add_row(site["name"], f"{site['inputs']:.0%}", f"{site['units']:.0%}", f"{site['relative_error']:.1%}")
    console.print(shown)
    console.print(f"read by a token    {data['read']:.0%} of the FFNs' weights")
    console.print(f"one token, a text  {data['kernel']}, {data['prefill']}")
    if found := data["perplexity"]:
        change = found["after"] / found["before"] - 1
        console.print(
            f"perplexity         {found['before']:.2f} -> {found['after']:.2f} ({change:+.1%}) on {found['tokens']:,} "
            "held-out tokens"
        )
