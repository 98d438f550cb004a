"""The splits of a task, from the Hub or from local files, checked before anything is trained on them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_glu.errors import DataError
from hf_glu.files import user_path
from hf_glu.hub import reachable
from hf_glu.tasks.files import find_splits, read_files
from hf_glu.tasks.inputs import columns
from hf_glu.tasks.movies import load_movies
from hf_glu.tasks.prompts import fields
from hf_glu.tasks.table import Task

if TYPE_CHECKING:
    from datasets import Dataset

LABEL = "label"
UNLABELED = -1
# columns that the text of a dataset of one's own may be in
TEXTS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("sentence",), ("text",))
Splits = dict[str, Any]


def load_task(task: Task, dataset: str | os.PathLike[str] | None = None) -> Splits:
    """Return the splits of ``task``: ``train``, its validation splits and, where they are, its test splits.

    Args:
        task: the task.
        dataset: a local folder in the layout that the dataset has on the Hub; None: the Hub (the movie reviews: pip).

    Raises:
        DataError: it can't be had, or lacks a column, a split or labels.
    """
    wanted = (*(() if task.model_of else ("train",)), *task.validation)
    if dataset is not None:
        files = find_splits(user_path(dataset), (*wanted, *task.test), config=task.config)
        splits: Splits = dict(read_files(files))
    elif not task.dataset:
        splits = dict(load_movies(ratings=task.form == "regression"))
    else:
        splits = _from_hub(task)
    for split in wanted:
        if split not in splits:
            raise DataError(f"{task.name}: the dataset has no split {split}, but {', '.join(splits)}")
    for split, data in splits.items():
        splits[split] = check_split(task, split, data, labeled=split in wanted)
    return splits


def _from_hub(task: Task) -> Splits:
    from datasets import load_dataset

    if not reachable():
        raise DataError(f"{task.dataset} is on the Hub, which can't be reached: give its folder with --dataset")
    loaded = load_dataset(task.dataset, task.config, revision=task.revision)
    names = ("train", *task.validation, *task.test)
    return {split: loaded[split] for split in names if split in loaded}


def check_split(task: Task, split: str, data: Dataset, *, labeled: bool) -> Any:
    """Return ``data`` with labels as the task counts them.

    Raises:
        DataError: a missing column, no rows, labels that are missing, unknown or out of range.
    """
    where = f"{task.name}, split {split}"
    if not len(data):
        raise DataError(f"{where}: there are no rows")
    needed = {*task.columns, *([LABEL] if labeled and task.form != "entity" else [])}
    if not labeled:
        needed -= {"answers"}
    if missing := sorted(needed - set(data.column_names)):
        raise DataError(f"{where}: there is no column {missing[0]!r}, but {', '.join(data.column_names)}")
    for column in task.columns:
        if column in data.column_names and column in needed and any(value is None for value in data[column]):
            raise DataError(f"{where}: some rows have nothing in the column {column!r}")
    if LABEL not in data.column_names or task.form == "entity":
        return data
    reader = label_reader(task, where)
    labels = [reader(value) for value in data[LABEL]]
    if labeled and UNLABELED in labels and task.form != "regression":
        raise DataError(f"{where}: it is unlabeled (-1), as leaderboards' test data are: it can't be trained or scored")
    return data.remove_columns(LABEL).add_column(LABEL, labels)


def label_reader(task: Task, where: str) -> Callable[[Any], Any]:
    """Return the function from a value of the label column to a class's number, or to a score."""
    if task.form == "regression":
        return lambda value: _score(value, where)
    names = {name.lower(): number for number, name in enumerate(task.labels)}
    spelled = {name.lower(): number for number, name in enumerate(task.spelling or ())}

    def read(value: Any) -> int:
        if value is None:
            return UNLABELED
        text = str(value).strip().lower()
        number = names.get(text, spelled.get(text))
        if number is None and text.lstrip("-").isdecimal():
            number = int(text)
        if number is None or not UNLABELED <= number < len(task.labels):
            raise DataError(
                f"{where}: the label {value!r} is none of {', '.join(task.labels)} (or 0 to {len(task.labels) - 1})"
            )
        return number

    return read


def _score(value: Any, where: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{where}: the label {value!r} is no number") from None
    if not math.isfinite(score):
        raise DataError(f"{where}: the label {value!r} is no finite number")
    return score


def own_task(
    source: str | os.PathLike[str], *, validation: str | os.PathLike[str] | None = None, seed: int = 0
) -> tuple[Task, Splits]:
    """Return a classification task for labelled sentences of one's own, and its splits.

    The text is in a column ``sentence`` or ``text``, pairs in ``sentence1`` and ``sentence2`` (or ``premise`` and
    ``hypothesis``), the class in ``label``. Without validation data a tenth is split off by ``seed``.

    Raises:
        DataError: no such file, an unknown format, or columns that aren't there.
    """
    path = user_path(source)
    files = find_splits(path, ("train", "validation")) if path.is_dir() else {"train": [path]}
    if validation is not None:
        files["validation"] = [user_path(validation)]
    splits: Splits = dict(read_files(files))
    if "train" not in splits:
        raise DataError(f"{path} has no train file")
    if "validation" not in splits:
        parts = splits["train"].train_test_split(test_size=0.1, seed=seed)
        splits = {"train": parts["train"], "validation": parts["test"]}
    names = splits["train"].column_names
    texts = next((texts for texts in TEXTS if set(texts) <= set(names)), None)
    if texts is None or LABEL not in names:
        raise DataError(f"{source} has the columns {', '.join(names)}: call the text `sentence` or `text`, the class "
                        "`label`")  # fmt: skip
    task = Task(
        name=path.stem, columns=texts, labels=_classes(splits["train"]), inputs=columns(*texts),
        prompt=fields(path.stem, **{text: text for text in texts}),
    )  # fmt: skip
    return task, {split: check_split(task, split, data, labeled=True) for split, data in splits.items()}


def _classes(train: Any) -> tuple[str, ...]:
    declared = getattr(train.features[LABEL], "names", None)
    names = tuple(declared or sorted({str(label) for label in train[LABEL]}))
    if len(names) < 2:
        raise DataError(f"the training data has one label only: {', '.join(names)}")
    return names


def head(data: Any, rows: int | None) -> Any:
    """Return the first ``rows`` rows (None: all)."""
    return data if rows is None or rows >= len(data) else data.select(range(rows))
