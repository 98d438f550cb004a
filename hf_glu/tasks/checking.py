"""Checks of a split before training: its columns, and its labels, which become class numbers or scores."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from hf_glu.errors import DataError
from hf_glu.tasks.table import Task

if TYPE_CHECKING:
    from datasets import Dataset

LABEL = "label"
UNLABELED = -1
# columns that are whole numbers in each task that has them
WHOLE = ("idx", "start1", "end1", "start2", "end2", "span1_index", "span2_index")
WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")
Splits: TypeAlias = "dict[str, Dataset]"
Label: TypeAlias = int | float


def check_split(task: Task, split: str, data: Dataset, *, labeled: bool) -> Dataset:
    """Check a split's columns and labels; return it with labels as class numbers or scores.

    Raises:
        DataError: a missing column, no rows, labels that are missing, unknown or out of range.
    """
    where = f"{task.name}, split {split}"
    needed = {*task.columns, *([LABEL] if labeled and task.form != "entity" else [])}
    if not labeled:
        needed -= {"answers"}
    check_columns(where, data, needed)
    for column in sorted(set(WHOLE) & set(data.column_names)):
        data = _whole_numbers(where, data, column, needed=column in task.columns)
    if LABEL not in data.column_names or task.form == "entity":
        return data
    reader = label_reader(task, where)
    if task.form == "tokens":
        return data if not labeled else with_labels(data, _tag_numbers(where, data, task.columns[0], reader))
    labels = [reader(value) for value in named_labels(data)]
    if labeled and UNLABELED in labels and task.form != "regression":
        raise DataError(f"{where}: it is unlabeled (-1), as leaderboards' test data are: it can't be trained or scored")
    return with_labels(data, labels)


def _tag_numbers(where: str, data: Dataset, words: str, reader: Callable[[object], Label]) -> list[list[Label]]:
    """Return the tags of each row as class numbers.

    Raises:
        DataError: a row without words, or without a tag for each.
    """
    found = []
    for number, (row, tags) in enumerate(zip(data[words], data[LABEL], strict=True), start=1):
        if (
            not isinstance(tags, list)
            or not row
            or len(row) != len(tags)
            or UNLABELED in (read := [*map(reader, tags)])
        ):
            raise DataError(f"{where}, row {number}: there must be words in {words!r}, and a tag in {LABEL!r} for each")
        found.append(read)
    return found


def check_columns(where: str, data: Dataset, needed: Iterable[str]) -> None:
    """Raise DataError if there are no rows, a column is missing, or a row has nothing in it."""
    if not len(data):
        raise DataError(f"{where}: there are no rows")
    if missing := sorted(set(needed) - set(data.column_names)):
        raise DataError(f"{where}: there is no column {missing[0]!r}, but {', '.join(data.column_names)}")
    for column in sorted(set(needed) - {LABEL}):
        if any(value is None for value in data[column]):
            raise DataError(f"{where}: some rows have nothing in the column {column!r}")


def named_labels(data: Dataset) -> list[object]:
    """Return the labels of ``data``, as names if it declares names, since their order may not be the task's."""
    names = getattr(data.features[LABEL], "names", None)
    labels = list(data[LABEL])
    if not names:
        return labels
    return [None if label is None or label == UNLABELED else names[label] for label in labels]


def with_labels(data: Dataset, labels: Sequence[object]) -> Dataset:
    """Return ``data`` with its labels replaced."""
    return data.remove_columns(LABEL).add_column(LABEL, labels)


def _whole_numbers(where: str, data: Dataset, column: str, *, needed: bool) -> Dataset:
    """Return ``data`` with a column's texts, as a csv file has them, turned into whole numbers."""
    values = data[column][:]
    if not any(isinstance(value, str) for value in values):
        return data
    wrong = next((value for value in values if not WHOLE_NUMBER.fullmatch(str(value))), None)
    if wrong is None:
        return data.remove_columns(column).add_column(column, [int(value) for value in values])
    if needed:
        raise DataError(f"{where}: {wrong!r} in the column {column!r} is no whole number")
    return data


def label_reader(task: Task, where: str) -> Callable[[object], Label]:
    """Return a function that turns a value of the label column into a class number, or a score."""
    if task.form == "regression":
        return lambda value: _score(value, where)
    names = {name.lower(): number for number, name in enumerate(task.labels)}
    spelled = {name.lower(): number for number, name in enumerate(task.spelling or ())}

    def read(value: object) -> int:
        if value is None:
            return UNLABELED
        text = str(value).strip().lower()
        number = names.get(text, spelled.get(text))
        if number is None and WHOLE_NUMBER.fullmatch(text):
            number = int(text)
        if number is None or not UNLABELED <= number < len(task.labels):
            raise DataError(
                f"{where}: the label {value!r} is none of {', '.join(task.labels)} (or 0 to {len(task.labels) - 1})"
            )
        return number

    return read


def _score(value: object, where: str) -> float:
    try:
        score = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError(f"{where}: the label {value!r} is no number") from None
    if not math.isfinite(score):
        raise DataError(f"{where}: the label {value!r} is no finite number")
    return score
