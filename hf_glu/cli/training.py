"""``hf-glu finetune`` and ``report``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_glu.cli import tables
from hf_glu.cli.commands import Json, app
from hf_glu.cli.early import check_jobs
from hf_glu.cli.fields import with_flags
from hf_glu.cli.quiet import quieten
from hf_glu.config.extras import need
from hf_glu.errors import OptionError
from hf_glu.training.filling import read_yaml, split_options
from hf_glu.training.options import JobOptions, TrainingOptions
from hf_glu.training.packaged import find_config

_CONFIG = "YAML file of options, or the name of one that `hf-glu configs` lists; flags override it."


def emit_once(result: Mapping[str, Any], show: Any, *, json: bool) -> None:
    """Show a result, on one of the processes."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        tables.emit(result, show, json=json)


def read_options(config: Path | None, given: dict[str, Any]) -> tuple[JobOptions, TrainingOptions]:
    """Return the options that a YAML file gives, and flags override."""
    values = {**(read_yaml(find_config(config)) if config else {}), **given}
    job, options = split_options(values, JobOptions, TrainingOptions)
    if not job.model:
        raise OptionError("give the pretrained checkpoint with --model")
    return job, options


def _check_flags(job: JobOptions, *, suite: str | None, only: list[str] | None, baseline: bool, resume: bool) -> None:
    """Raise OptionError for a flag that would be ignored."""
    if only and not suite:
        raise OptionError("--only chooses tasks of a suite: give --suite")
    if resume and not job.output:
        raise OptionError("--resume goes on with the run in a folder: give it with --output")
    if suite and baseline:
        raise OptionError("a suite has no baseline beside it: run it once more without --to, into another --output")


@app.command()
@with_flags(JobOptions, TrainingOptions)
def finetune(
    given: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help=_CONFIG)] = None,
    suite: Annotated[
        str | None, typer.Option(help="All tasks of glue, superglue or open_nlu; resumes where it stopped.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="A task of the suite (again for more).")] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Fine-tune the dense model the same way, too.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    json: Json = False,
) -> None:
    """Convert a checkpoint, fine-tune it with Accelerate, evaluate and save it."""
    job, options = read_options(config, given)
    _check_flags(job, suite=suite, only=only, baseline=baseline, resume=resume)
    need(*job.packages, what="finetune")
    check_jobs(job, suite=suite, only=only)
    quieten()

    from hf_glu.publishing.card.card import write_card
    from hf_glu.training.baseline import finetune_and_report
    from hf_glu.training.suite import run_suite

    if suite:
        emit_once(run_suite(suite, job, options, only=only), tables.suite, json=json)
        return
    result = finetune_and_report(job, options, baseline=baseline, resume=resume, finish=write_card)
    emit_once(result, tables.finetuned, json=json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Of a run, a suite or a comparison.")], json: Json = False
) -> None:
    """Write one self-contained HTML page about a run, a suite or a comparison."""
    from hf_glu.publishing.report import write_report

    path = write_report(folder)
    tables.emit({"report": str(path)}, tables.path, json=json)
