"""``hf-glu pretrain`` and ``perplexity``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_glu.cli import tables
from hf_glu.cli.commands import Json, app
from hf_glu.cli.early import check_language, check_sources
from hf_glu.cli.fields import with_flags
from hf_glu.cli.quiet import quieten
from hf_glu.cli.training import emit_once
from hf_glu.config.extras import need
from hf_glu.errors import OptionError
from hf_glu.training.filling import read_yaml
from hf_glu.training.language.options import OBJECTIVES, LanguageOptions, LanguageTraining, language_options
from hf_glu.training.options import check_choice
from hf_glu.training.packaged import find_config

_OPTIONS = "YAML file of options, or the name of one that `hf-glu configs` lists; flags override it."
_MORE = "More files of --data, as a shell writes out a pattern."


@app.command()
@with_flags(LanguageOptions, LanguageTraining)
def pretrain(
    given: dict[str, Any],
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help=_MORE)] = None,
    options: Annotated[Path | None, typer.Option(help=_OPTIONS)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    json: Json = False,
) -> None:
    """Train a language model on text: go on with a pretrained one, converted first or not, or begin from scratch."""
    if files and "data" not in given:
        raise OptionError(f"what is {files[0]}? Text to train on is given with --data")
    if files:
        given["data"] = [*given["data"], *files]
    if resume and not given.get("output"):
        raise OptionError("--resume goes on with the run in a folder: give it with --output")
    values = {**(read_yaml(find_config(options)) if options else {}), **given}
    job, training = language_options(values)
    check_language(job)
    need("datasets", *(["peft"] if job.peft == "lora" else []), what="pretrain")
    quieten()

    from hf_glu.publishing.card.card import write_card
    from hf_glu.training.language.pretraining import run_language

    result = run_language(job, training, resume=resume, finish=write_card)
    emit_once(result, tables.finetuned, json=json)


@app.command()
def perplexity(
    model: Annotated[str, typer.Argument(help="Local folder, Hub id or FILE.gguf.")],
    data: Annotated[list[str], typer.Option(help="Text, as of pretrain (again for more).")],
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help=_MORE)] = None,
    objective: Annotated[str, typer.Option(help="clm, mlm or span; auto: by the model's class.")] = "auto",
    text_column: Annotated[str | None, typer.Option(help="Column of the text.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a block; as many as the model reads.")] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks of one forward pass.")] = 16,
    blocks: Annotated[int | None, typer.Option(help="At most so many blocks, from the first on.")] = None,
    json: Json = False,
) -> None:
    """Measure a language model on text: loss, perplexity, bits per byte."""
    check_choice("objective", objective, OBJECTIVES)
    for name, value in {"batch-size": batch_size, "blocks": blocks, "max-length": max_length}.items():
        if value is not None and value < 1:
            raise OptionError(f"--{name} must be at least 1, got {value}")
    check_sources(model)
    need("datasets", what="perplexity")
    quieten()

    from hf_glu.training.language.pretraining import perplexity as measure

    found = measure(
        model, [*data, *(files or [])], objective=objective, text_column=text_column, max_length=max_length,
        batch_size=batch_size, blocks=blocks,
    )  # fmt: skip
    tables.emit(found, tables.perplexity, json=json)
