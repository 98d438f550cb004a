"""Reading what a job is trained on: its tasks, their rows, and hashes of their files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from hf_glu.checkpoint.writing import user_path
from hf_glu.errors import DataError, OptionError
from hf_glu.tasks.checking import Splits
from hf_glu.tasks.files import find_splits, hash_file
from hf_glu.tasks.loading import check_source, head, load_task
from hf_glu.tasks.movies import fetch_reviews
from hf_glu.tasks.own import own_files, own_task
from hf_glu.tasks.table import TASKS, Task, find_suite, find_task
from hf_glu.training.options import JobOptions

# hashes of a split's files, or a revision on the Hub, by what they are of
FileRecord: TypeAlias = dict[str, list[str | None]]
# a task, and its rows by split
TaskRows: TypeAlias = tuple[Task, Splits]


def task_name(job: JobOptions) -> str:
    """Return the name that tables and reports give a job's task."""
    return job.task or (f"mixture of {job.mixture}" if job.mixture else Path(str(job.dataset)).stem)


def chosen_tasks(job: JobOptions) -> list[Task]:
    """Return the tasks that a job names; none if it has a user's own data.

    Raises:
        UnknownNameError, DataError, OptionError: there is no such task, or it can't be had or trained.
    """
    if job.mixture is not None:
        return [task for task in find_suite(job.mixture) if not task.model_of]
    if job.task is None and job.dataset is None:
        raise OptionError("give a task (such as sst2), or files of your own with dataset")
    if job.task is None:
        return []
    task = find_task(job.task)
    if task.model_of:
        raise OptionError(f"{task.name} has no training data: predict with {task.model_of} writes its predictions")
    check_source(task, job.dataset)
    return [task]


def suite_tasks(suite: str, job: JobOptions, only: list[str] | None) -> list[Task]:
    """Return the tasks of a suite that a job runs.

    Raises:
        UnknownNameError, OptionError: there is no such suite or task, or the job says otherwise what to run.
    """
    tasks = [task for task in find_suite(suite) if not task.model_of]
    if unknown := sorted(set(only or ()) - {task.name for task in tasks}):
        raise OptionError(f"{suite} has no task {unknown[0]}, but {', '.join(task.name for task in tasks)}")
    if job.folder is None:
        raise OptionError("a suite needs an output folder")
    if job.task:
        raise OptionError(f"a suite is all of its tasks: leave task={job.task} out, or choose some with only")
    return tasks


def read_tasks(job: JobOptions) -> list[TaskRows]:
    """Load the task of a job, or those of its mixture, with their rows.

    Raises:
        UnknownNameError, DataError, OptionError: it can't be had.
    """
    tasks = chosen_tasks(job)
    if not tasks:
        return [own_task(str(job.dataset), job.own, validation=job.validation)]
    return [(task, load_task(task, job.dataset)) for task in tasks]


def diagnostics(tasks: Iterable[Task]) -> list[Task]:
    """Return the diagnostic tasks, without training data, that models of ``tasks`` answer, too."""
    known = {task.name for task in tasks}
    return [task for task in TASKS.values() if task.model_of in known]


def read_diagnostics(job: JobOptions, sources: list[TaskRows]) -> list[TaskRows]:
    """Load the `diagnostics` of some tasks with their rows."""
    return [(task, load_task(task, job.dataset)) for task in diagnostics(task for task, _ in sources)]


def check_predictable(sources: list[TaskRows]) -> None:
    """Raise OptionError unless there is a test split for each file that the leaderboards want."""
    for task, raw in sources:
        if not task.files:
            raise OptionError(f"predict writes a leaderboard's files, and {task.name} has no leaderboard")
        if missing := [split for split in task.test if split not in raw]:
            raise OptionError(f"{task.name} has no test split {missing[0]} to predict")


def check_data(job: JobOptions) -> None:
    """Check that a job's task exists, and its local files do.

    Raises:
        UnknownNameError, DataError, OptionError: as of `read_tasks`, as far as it shows without reading.
    """
    tasks = chosen_tasks(job)
    if not tasks:
        _check_files(own_files(str(job.dataset), job.validation))
    for task in tasks if job.dataset is not None else ():
        _local_files(task, str(job.dataset))


def data_record(job: JobOptions) -> FileRecord:
    """Return what identifies a job's data: hashes of its files, by split, or a revision on the Hub.

    Raises:
        UnknownNameError, DataError, OptionError: as of `read_tasks`.
    """
    tasks = chosen_tasks(job)
    if not tasks:
        return _hashes(own_files(str(job.dataset), job.validation))
    every = [*tasks, *(diagnostics(tasks) if job.predict else ())]
    return {f"{task.name} {key}": value for task in every for key, value in _task_record(task, job.dataset).items()}


def _task_record(task: Task, dataset: str | None) -> FileRecord:
    if dataset is not None:
        return _hashes(_local_files(task, dataset))
    if task.dataset:
        return {"dataset": [task.dataset, task.config, task.revision]}
    return _hashes({"reviews": [fetch_reviews()]})


def _local_files(task: Task, dataset: str) -> dict[str, list[Path]]:
    return find_splits(user_path(dataset), ("train", *task.validation, *task.test), config=task.config)


def _check_files(files: dict[str, list[Path]]) -> None:
    for path in (path for paths in files.values() for path in paths):
        if not path.is_file():
            raise DataError(f"there is no file {path}")


def _hashes(files: dict[str, list[Path]]) -> FileRecord:
    _check_files(files)
    return {split: [hash_file(path) for path in paths] for split, paths in files.items()}


def calibration_texts(job: JobOptions, source: TaskRows, *, text: bool) -> list[str]:
    """Return the training texts that a conversion is fitted on."""
    task, raw = source
    rows = head(raw["train"], job.calibration)
    return [task.prompt(row) if text else task.inputs(row)[0][0] for row in rows]
