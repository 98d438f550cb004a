"""Running all tasks of a suite into one table; an interrupted suite goes on where it stopped."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from accelerate import PartialState

from hf_glu.checkpoint.files import PREDICTIONS_FOLDER, RUN_FILE, SUITE_CSV_FILE, SUITE_FILE, SUITE_MARKDOWN_FILE
from hf_glu.checkpoint.jsonio import read_object, write_json
from hf_glu.checkpoint.writing import PARTIAL, check_folder, is_vacant, whole_file, write_text, writing
from hf_glu.errors import CheckpointError, shown
from hf_glu.tasks.metrics.shown import show_metrics
from hf_glu.tasks.submission import zip_predictions
from hf_glu.tasks.table import Task
from hf_glu.training.data.sources import suite_tasks
from hf_glu.training.job import run_job
from hf_glu.training.options import JobOptions, TrainingOptions
from hf_glu.training.record import make_record
from hf_glu.training.results import Results, SuiteTable
from hf_glu.training.saving import known_results

RunTask = Callable[..., Results]


def run_suite(
    suite: str, job: JobOptions, options: TrainingOptions, *, only: list[str] | None = None, run: RunTask = run_job
) -> SuiteTable:
    """Run the tasks of ``suite``, each in a subfolder of ``job.output``; return their results and the suite's score.

    Tasks that are finished are not run again; one that was interrupted is resumed; one that was made of another model,
    data or options is refused before anything is run. The folder holds ``suite.json``,
    ``results.csv``, ``results.md`` and, with ``job.predict``, the leaderboard's zip file.

    Args:
        suite: ``glue``, ``superglue`` or ``open_nlu``.
        job: without a task.
        options: of every task.
        only: names of tasks; None: all that can be trained.
        run: runs one task.

    Raises:
        HfGluError: as `run_job`.
    """
    tasks, folder = suite_tasks(suite, job, only), job.folder
    assert folder is not None  # as `suite_tasks` sees to
    check_folder(folder)
    _check_same(folder, suite)
    jobs = {task.name: replace(job, task=task.name, output=str(folder / task.name)) for task in tasks}
    known = {name: _known(Path(str(mine.output)), mine, options) for name, mine in jobs.items()}  # before any is run
    done: dict[str, Results] = {}
    for name, mine in jobs.items():
        if (finished := known[name]) is not None:
            done[name] = finished
        elif not only or name in only:
            done[name] = run(mine, options, resume=(folder / name / RUN_FILE).is_file())
        else:
            continue
        table = _table(suite, job, tasks, done)
        write_suite(folder, table)
    if job.predict and PartialState().is_main_process:
        table["predictions"], table["missing_predictions"] = _zip(suite, folder, tasks)
        write_suite(folder, table)
    return table


def _known(place: Path, job: JobOptions, options: TrainingOptions) -> Results | None:
    return known_results(place, make_record(job, options)) if (place / RUN_FILE).is_file() else None


def _check_same(folder: Path, suite: str) -> None:
    if (folder / SUITE_FILE).is_file():
        known = read_object(folder / SUITE_FILE).get("suite")
        if known != suite:
            raise CheckpointError(f"{folder} has the suite {shown(known)}, not {suite!r}: choose another")
    elif folder.exists() and not (folder.is_dir() and all(map(_is_suites, folder.iterdir()))):
        raise CheckpointError(f"{folder} exists already and has no suite in it: choose another output")


def _is_suites(path: Path) -> bool:
    """Return whether ``path`` may be left by a suite that was stopped before its table was written."""
    return (path / RUN_FILE).is_file() or path.name.startswith(PARTIAL) or (path.is_dir() and is_vacant(path))


def _table(suite: str, job: JobOptions, tasks: list[Task], done: dict[str, Results]) -> SuiteTable:
    averaged = [task.name for task in tasks if task.averaged]
    missing = [name for name in averaged if name not in done]
    scores = [done[name]["score"] for name in averaged if name in done]
    # what the model has as it is, where nothing is converted
    rows = (row for results in done.values() for row in results.get("activations", ()))
    found = dict.fromkeys(str(row["activation"]) for row in rows)
    return {
        "suite": suite,
        "model": job.title,
        "activation": job.conversion or ", ".join(found) or None,
        "tasks": done,
        "score": fmean(scores) if scores else None,
        "partial": bool(missing),
        "missing": missing,
    }


def write_suite(folder: Path, table: SuiteTable) -> None:
    """Write a suite's table as JSON, CSV and Markdown, on the main process only."""
    if not PartialState().is_main_process:
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SUITE_FILE, table)
    rows = [(name, key, value) for name, results in table["tasks"].items() for key, value in results["metrics"].items()]
    scores = [(name, "score", results["score"]) for name, results in table["tasks"].items()]
    total = [(table["suite"], "score, partial" if table["partial"] else "score", table["score"])]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("task", "metric", "value"), *rows, *scores, *total])
    write_text(folder / SUITE_CSV_FILE, text.getvalue())
    lines = ["| task | metrics | score |", "|---|---|---|"]
    for name, results in table["tasks"].items():
        lines.append(f"| {name} | {show_metrics(results['metrics'])} | {results['score']:.2%} |")
    mark = f" (partial: {', '.join(table['missing'])} missing)" if table["partial"] else ""
    shown = "-" if table["score"] is None else f"{table['score']:.2%}"
    lines.append(f"| **{table['suite']}** | mean of the scores{mark} | {shown} |")
    write_text(folder / SUITE_MARKDOWN_FILE, "\n".join(lines) + "\n")


def _zip(suite: str, folder: Path, tasks: list[Task]) -> tuple[str, list[str]]:
    together = folder / PREDICTIONS_FOLDER
    with writing(together):
        together.mkdir(exist_ok=True)
    for task in tasks:
        for path in sorted((folder / task.name / PREDICTIONS_FOLDER).glob("*")):
            with whole_file(together / path.name) as partial:
                partial.write_bytes(path.read_bytes())
    path, missing = zip_predictions(suite, together)
    return str(path), missing
