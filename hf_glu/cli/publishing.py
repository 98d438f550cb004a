"""``hf-glu push``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from hf_glu.cli import tables
from hf_glu.cli.commands import Json, app

_SOURCE = "Checkpoint: local folder, or a repository's state USER/NAME@COMMIT."
_REVISION = "Branch to push to, made where there is none. main."


@app.command()
def push(
    source: Annotated[str, typer.Argument(metavar="DIR", help=_SOURCE)],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Repository on the Hub, such as ada/bert-geglu.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help=_REVISION)] = None,
    code: Annotated[bool, typer.Option(help="Add code that loads it where hf_glu isn't installed.")] = True,
    check: Annotated[bool, typer.Option(help="Load it in fresh processes first, and compare bitwise.")] = True,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    token: Annotated[str | None, typer.Option(help="Of the Hub; else HF_TOKEN, or that of `hf auth login`.")] = None,
    json: Json = False,
) -> None:
    """Publish a checkpoint on the Hub in one commit, after fresh processes have loaded it.

    To go back to an older state, load or push it by its commit: hf-glu push USER/NAME@COMMIT USER/NAME. Every command
    that takes a Hub id takes USER/NAME@BRANCH, @TAG or @COMMIT.
    """
    from hf_glu.cli.early import check_sources
    from hf_glu.publishing.hub.upload import PushTarget

    PushTarget(repo=repository, token=token, revision=revision)
    check_sources(source, token=token)

    from hf_glu.publishing.hub.push import push as push_checkpoint

    result = push_checkpoint(
        source, repository, private=private or None, token=token, revision=revision, message=message, code=code,
        check=check,
    )  # fmt: skip
    tables.emit(result, show, json=json)


def show(data: tables.Data, console: Console) -> None:
    """Show what was pushed."""
    shown = tables.table(f"{data['repo']}, {data['revision']}", "file", "#bytes")
    code = sum(data["files"][name] for name in data["code"])
    for name, size in data["files"].items():
        if name not in data["code"]:
            shown.add_row(name, f"{size:,}")
    if data["code"]:
        shown.add_row(f"code for use without hf_glu: {len(data['code'])} files", f"{code:,}")
    console.print(shown)
    console.print(f"commit {data['commit']}")
    checked = " and ".join(data["checked"])
    console.print(f"loaded in fresh processes ({checked}): equal bitwise" if checked else "not checked")
    if data["left_out"]:
        console.print("left out: " + ", ".join(data["left_out"]))
    console.print(data["url"], soft_wrap=True)
