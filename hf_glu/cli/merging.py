"""``hf-glu merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_glu.checkpoint.folders import staged_folder
from hf_glu.checkpoint.loading import read_texts
from hf_glu.cli import tables
from hf_glu.cli.commands import Json, app
from hf_glu.errors import OptionError

_MODELS = "Checkpoints of one architecture: local folders or Hub ids."
_ROUTER = "random, or hidden: rows are the FFNs' mean inputs on each model's --prompts."
_PROMPTS = "Text file, a text a line, of the first model; those of the others follow, or again for each."


@app.command()
def merge(
    models: Annotated[list[str], typer.Argument(metavar="A B...", help=_MODELS)],
    output: Annotated[Path, typer.Option(help="New folder.")],
    router: Annotated[str, typer.Option(help=_ROUTER)] = "random",
    prompts: Annotated[list[Path] | None, typer.Option(metavar="FILE...", help=_PROMPTS)] = None,
    attention: Annotated[str, typer.Option(help="All that is no FFN: average, or first.")] = "average",
    top_k: Annotated[int, typer.Option(help="Experts that a token uses.")] = 2,
    json: Json = False,
) -> None:
    """Merge fine-tunes of one architecture into a mixture of experts, each model's FFNs one, with a model card."""
    from hf_glu.cli import early

    models, files = split_prompts(models, prompts or [])
    early.check_merging(models, router, len(files), attention, top_k)
    texts = [read_texts(file) for file in files] or None
    early.check_destinations(output)
    early.check_sources(*models)

    from hf_glu.checkpoint.merge import merge_checkpoints
    from hf_glu.publishing.card.card import write_card

    with staged_folder(output) as stage:  # with its card, or not at all
        report = merge_checkpoints(models, stage, router=router, prompts=texts, attention=attention, top_k=top_k)
        write_card(stage, repo_id=output.absolute().name)
    tables.emit(report, tables.report, json=json)


def split_prompts(models: list[str], prompts: list[Path]) -> tuple[list[str], list[Path]]:
    """Return the models and the files of prompts, which ``--prompts A B C`` leaves among the models' names.

    Raises:
        OptionError: they aren't as many.
    """
    if not prompts:
        return models, prompts
    count, odd = divmod(len(models) + len(prompts), 2)
    if odd or count < len(prompts):
        raise OptionError(f"give a file of prompts for each model, got {len(models) + len(prompts)} names in all")
    return models[:count], [*prompts, *map(Path, models[count:])]
