"""The studies of the evidence, each one command; what is finished is never run again.

python -m recipes.evidence fetch DIR
python -m recipes.evidence run STUDY --preset cpu --size 0.3m --data DIR --output FOLDER
python -m recipes.evidence page FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hf_glu.cli.quiet import quieten
from hf_glu.errors import HfGluError, OptionError, nearest
from recipes.evidence.document import DOCUMENT
from recipes.evidence.fetch import main as fetch
from recipes.evidence.pages import write_pages
from recipes.evidence.presets import PRESETS
from recipes.evidence.showing import RESULTS
from recipes.evidence.studies import STUDIES, run_study

app = typer.Typer(add_completion=False, help=__doc__)
app.command("fetch")(fetch)
_DATA = "The folder that `fetch` wrote."


def guarded(work: Callable[[], object]) -> None:
    """Do something; what is wrong is one line, and exit code 2."""
    try:
        work()
    except HfGluError as error:
        print(f"evidence: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def run(
    study: Annotated[str, typer.Argument(help=", ".join(STUDIES))],
    data: Annotated[Path, typer.Option(help=_DATA)],
    output: Annotated[Path, typer.Option(help="Folder of all runs, which an interrupted study goes on in.")],
    preset: Annotated[str, typer.Option(help=", ".join(PRESETS))] = "cpu",
    size: Annotated[str | None, typer.Option(help="One of the preset's sizes; else all, the smallest first.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="How many runs at once, each on a core.")] = 1,
) -> None:
    """Run a study, or go on with it; its results are JSON files in OUTPUT/results after each seed."""

    def work() -> None:
        if study not in STUDIES:
            raise OptionError(f"there is no study {study!r}; {nearest(study, list(STUDIES))}")
        if preset not in PRESETS:
            raise OptionError(f"there is no preset {preset!r}; {nearest(preset, list(PRESETS))}")
        quieten()
        run_study(study, preset, size, data.expanduser(), output.expanduser(), partial(print, flush=True), workers)

    guarded(work)


@app.command()
def page(
    folder: Annotated[Path, typer.Argument(help="Where evidence.html goes.")],
    results: Annotated[Path, typer.Option(help="Folder of the results' JSON files.")] = RESULTS,
    document: Annotated[Path, typer.Option(help="Where the documentation's page goes.")] = DOCUMENT,
) -> None:
    """Write the page with curves and forest plots, and the documentation's page, from the results alone."""
    guarded(lambda: print(write_pages(folder, document, results)))


if __name__ == "__main__":
    app()
