"""``hf-glu configs``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from hf_glu.cli import tables
from hf_glu.cli.commands import Json, app
from hf_glu.errors import UnknownNameError, nearest
from hf_glu.training.packaged import FOLDERS, packaged

_USE = {"configs": "hf-glu finetune --config NAME", "accelerate": "accelerate launch --config_file FILE -m hf_glu"}


@app.command()
def configs(
    name: Annotated[str | None, typer.Argument(help="Print the path of this one.")] = None, json: Json = False
) -> None:
    """List the YAML files that come with hf_glu: of finetune, and of accelerate launch."""
    found = [
        {"name": known, "use": _USE[kind], "file": str(path)}
        for kind in FOLDERS
        for known, path in packaged(kind).items()
    ]
    chosen = [row for row in found if name in (None, row["name"])]
    if not chosen:
        raise UnknownNameError(f"unknown config {name!r}; {nearest(name, [row['name'] for row in found])}")
    tables.emit({"configs": chosen}, show if name is None else show_path, json=json)


def show(data: tables.Data, console: Console) -> None:
    """Show names, and what they are for."""
    shown = tables.table("YAML files", "name", "for")
    for row in data["configs"]:
        shown.add_row(row["name"], row["use"])
    console.print(shown)
    console.print("hf-glu configs NAME prints the path of one")


def show_path(data: tables.Data, console: Console) -> None:
    """Show where one file is."""
    console.print(data["configs"][0]["file"], soft_wrap=True)
