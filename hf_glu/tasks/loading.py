"""Loading a task's splits from the Hub or from local files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hf_glu.checkpoint.hub import reachable
from hf_glu.checkpoint.writing import user_path
from hf_glu.config.extras import need
from hf_glu.errors import DataError
from hf_glu.tasks.checking import Splits, check_split
from hf_glu.tasks.files import find_splits, read_files
from hf_glu.tasks.movies import load_movies
from hf_glu.tasks.own import own_task
from hf_glu.tasks.table import Task

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["head", "load_task", "own_task"]


def load_task(task: Task, dataset: str | os.PathLike[str] | None = None) -> Splits:
    """Load and check the splits of ``task``: ``train``, the validation splits, and test splits if there are any.

    Args:
        task: the task.
        dataset: a local folder in the layout that the dataset has on the Hub; None: the Hub (the movie reviews: pip).

    Raises:
        DataError: it can't be had, or lacks a column, a split or labels.
        MissingPackageError: what reads it isn't installed.
    """
    need("datasets", what=task.name)
    wanted = (*(() if task.model_of else ("train",)), *task.validation)
    check_source(task, dataset)
    if dataset is not None:
        files = find_splits(user_path(dataset), (*wanted, *task.test), config=task.config)
        splits: Splits = dict(read_files(files))
    elif task.name.startswith("movie_"):
        splits = dict(load_movies(ratings=task.form == "regression"))
    else:
        splits = _from_hub(task)
    for split in wanted:
        if split not in splits:
            raise DataError(f"{task.name}: the dataset has no split {split}, but {', '.join(splits)}")
    for split, data in splits.items():
        splits[split] = check_split(task, split, data, labeled=split in wanted)
    return splits


def check_source(task: Task, dataset: str | os.PathLike[str] | None) -> None:
    """Raise DataError if there is nowhere to have a task from but a folder, and none is given."""
    if dataset is None and not task.dataset and not task.name.startswith("movie_"):
        fetch = "python -m recipes.evidence.fetch DIR"
        raise DataError(f"{task.name} is made of what packages hold: `{fetch}` writes it, give DIR with --dataset")


def _from_hub(task: Task) -> Splits:
    from datasets import load_dataset

    if not reachable():
        raise DataError(f"{task.dataset} is on the Hub, which can't be reached: give its folder with --dataset")
    loaded = load_dataset(task.dataset, task.config, revision=task.revision)
    names = ("train", *task.validation, *task.test)
    return {split: loaded[split] for split in names if split in loaded}


def head(data: Dataset, rows: int | None) -> Dataset:
    """Return the first ``rows`` rows (None: all)."""
    return data if rows is None or rows >= len(data) else data.select(range(rows))
