"""A fine-tuning job beside its dense baseline: one result, one table, ``hf_glu_report.json``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hf_glu.activation import registry
from hf_glu.checkpoint.carrying import without_paths
from hf_glu.checkpoint.files import REPORT_FILE
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.checkpoint.provenance import Base, base_of
from hf_glu.errors import OptionError
from hf_glu.training.job import Job, run_job
from hf_glu.training.options import JobOptions, TrainingOptions
from hf_glu.training.results import JobReport, ResultRow, Results
from hf_glu.training.run import TrainingRun

_log = logging.getLogger(__name__)


def finetune_and_report(
    job: JobOptions,
    options: TrainingOptions,
    *,
    baseline: bool = False,
    resume: bool = False,
    finish: Callable[[Path], object] | None = None,
) -> JobReport:
    """Run a job, and before it the same job without a conversion if ``baseline`` is set; return both results.

    ``job.output`` holds the model, its tokenizer, log, results and ``hf_glu_report.json``. In the end ``finish`` is
    given the folder: `hf_glu.publishing.card.card.write_card` adds the model card.

    Raises:
        HfGluError: bad input, before anything is trained; a loss that is NaN; Ctrl-C.
    """
    start = time.perf_counter()
    if baseline and not job.conversion:
        raise OptionError("baseline is the dense model beside a converted one: give the activation with to")
    if job.to:
        registry[job.to]
    base = base_of(job.model, job.base_model)
    ours = Job(job, options, resume=resume)  # fails early, before the baseline is trained
    if not job.output and ours.main:
        _log.warning("without an output folder the model is trained and evaluated, and not kept")
    dense = run_job(replace(job.dense(), output=None, predict=False), options) if baseline else None
    outcome = ours.run()
    return report_run(ours, outcome, base, dense=dense, begun=start, finish=finish)


def report_run(
    ours: TrainingRun,
    outcome: Results,
    base: Base | None,
    *,
    dense: Results | None = None,
    begun: float,
    finish: Callable[[Path], object] | None = None,
) -> JobReport:
    """Return a run's report, and write it into its folder.

    Args:
        ours: the run.
        outcome: its results.
        base: what it began with; None: a new model.
        dense: the results of the same run without a conversion.
        begun: when the work did, by `time.perf_counter`.
        finish: is given the folder in the end.
    """
    result: JobReport = {
        "model": ours.entry["model"],
        "base": base,
        "task": ours.entry["task"],
        "activation": ours.entry["activation"],
        "options": ours.entry["options"] | {"mixed_precision": ours.options.mixed_precision()},
        "rows": _rows(dense, outcome, ours),
        "dense": dense,
        "outcome": outcome,
        "seconds": time.perf_counter() - begun,
    }
    if ours.folder is not None and ours.main:
        write_json(ours.folder / REPORT_FILE, without_paths(result))  # it goes along when the model is pushed
        if finish is not None:
            finish(ours.folder)
    return result


def _rows(dense: Results | None, outcome: Results, ours: TrainingRun) -> list[ResultRow]:
    """Return the rows of the final table: the dense baseline, the converted model before and after training."""
    rows: list[ResultRow] = []
    to = ours.entry["activation"]
    if dense:
        rows.append(_row(f"dense, {ours.trained}", dense["metrics"], dense))
    healing = outcome.get("healing")
    if healing and healing["metrics"]:
        row = _row("teacher", healing["metrics"], outcome)
        counts = {"parameters": healing["parameters"], "active_parameters": healing["parameters"]}
        rows.append({**row, "seconds": None, **counts})  # type: ignore[typeddict-item]
    if outcome["before"]:
        conversion = outcome["conversion"]
        difference = conversion["max_abs_difference"] if conversion else None
        row = _row(f"{to}, converted" if to else "before", outcome["before"], outcome)
        rows.append({**row, "seconds": None, "max_abs_difference": difference})
    done = "healed" if healing else ours.trained
    rows.append(_row(done if healing and not to else f"{ours.title}, {done}", outcome["metrics"], outcome))
    return rows


def _row(name: str, metrics: dict[str, float], outcome: Results) -> ResultRow:
    return {
        "model": name,
        "metrics": metrics,
        "parameters": outcome["parameters"],
        "active_parameters": outcome["active_parameters"],
        "max_abs_difference": None,
        "seconds": outcome["training"]["seconds"],
    }
