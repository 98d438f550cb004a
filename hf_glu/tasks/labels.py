"""Reading the labels of a user's own data, one for each row: classes by all of their letters, or scores."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Required, TypedDict

from hf_glu.errors import DataError
from hf_glu.tasks.checking import LABEL, Splits, named_labels, with_labels
from hf_glu.tasks.columns import NUMBER
from hf_glu.tasks.table import TaskForm

if TYPE_CHECKING:
    from datasets import Dataset

WHOLE = re.compile(r"0|-?[1-9][0-9]*")
SHOWN = 8


class LabelTraits(TypedDict, total=False):
    """The fields of a `Task` that follow from the labels of a file."""

    labels: Required[tuple[str, ...]]
    form: TaskForm
    metric: str
    main: tuple[str, ...]


SCORES: LabelTraits = {
    "labels": (),
    "form": "regression",
    "metric": "pearson_spearman",
    "main": ("pearson", "spearmanr"),
}


def read_labels(name: str, splits: Splits, *, problem: str | None = None) -> tuple[LabelTraits, Splits]:
    """Return the task's fields that labels decide, and the splits with class numbers or scores.

    Args:
        name: the data's, for messages.
        splits: with labels as they are written.
        problem: ``single`` or ``regression``; None: numbers with fractions are scores, all else are classes.

    Raises:
        DataError: labels that are neither, or not what ``problem`` says.
    """
    read = {split: _labels(f"{name}, split {split}", data) for split, data in splits.items()}
    labels = strip_classes(name, read)
    if problem == "regression":
        _check_scores(name, labels)
    elif problem == "single" or not _are_scores(name, [label for each in labels.values() for label in each]):
        classes = order_classes(name, getattr(splits["train"].features[LABEL], "names", None), labels["train"])
        return {"labels": classes}, {
            split: with_labels(data, number_classes(name, labels[split], classes)) for split, data in splits.items()
        }
    return SCORES, {
        split: with_labels(data, [float(label) for label in labels[split]]) for split, data in splits.items()
    }


def _labels(where: str, data: Dataset) -> list[str]:
    """Return the labels as they are written.

    Raises:
        DataError: a row without a label, or with several.
    """
    found = []
    for number, label in enumerate(named_labels(data), start=1):
        if is_missing(label):
            raise DataError(f"{where}, row {number}: there is no label")
        if not isinstance(label, (str, int, float)):
            more = "; several classes a row are --problem multi" if isinstance(label, list) else ""
            raise DataError(f"{where}, row {number}: the label {shortened(label)} isn't one class or score{more}")
        found.append(str(label))
    return found


def is_missing(label: object) -> bool:
    """Return whether a value is no label: None, NaN or an empty text."""
    return label is None or label != label or (isinstance(label, str) and not label.strip())  # NaN isn't itself


def strip_classes(name: str, labels: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return labels without spaces around them; raise DataError if two labels differ in spaces only."""
    spelled: dict[str, str] = {}
    for label in dict.fromkeys(label for each in labels.values() for label in each):
        if (other := spelled.setdefault(label.strip(), label)) != label:
            raise DataError(f"{name}: the labels {other!r} and {label!r} differ in spaces only")
    return {split: [label.strip() for label in each] for split, each in labels.items()}


def _check_scores(name: str, labels: dict[str, list[str]]) -> None:
    for split, each in labels.items():
        for number, label in enumerate(each, start=1):
            if not NUMBER.fullmatch(label) or not math.isfinite(float(label)):
                raise DataError(f"{name}, split {split}, row {number}: the label {label!r} is no score")


def _are_scores(name: str, labels: list[str]) -> bool:
    """Return whether labels are scores: numbers, some of which have a fraction."""
    kinds = dict.fromkeys(labels)
    decimal = [label for label in kinds if NUMBER.fullmatch(label) and not label.lstrip("+-").isdecimal()]
    if not decimal:
        return False
    if words := [label for label in kinds if not NUMBER.fullmatch(label)]:
        raise DataError(f"{name}: the labels are numbers such as {decimal[0]} and words such as {words[0]!r}")
    if infinite := [label for label in kinds if not math.isfinite(float(label))]:
        raise DataError(f"{name}: the score {infinite[0]} is too large")
    if all(float(label).is_integer() for label in kinds):
        raise DataError(
            f"{name}: the labels are whole numbers written as fractions, {listed(sorted(kinds))}: say what they are "
            "with --problem single or regression"
        )
    return True


def order_classes(name: str, declared: Iterable[str] | None, labels: Iterable[str]) -> tuple[str, ...]:
    """Return the classes' names: in the order that the file declares, else of numbers, else of the alphabet.

    Raises:
        DataError: there is one only, or two are the same but for spaces.
    """
    names = tuple(str(label).strip() for label in declared or ())
    found = set(names or labels)
    if len(found) < len(names):
        raise DataError(f"{name}: two of the declared labels are the same but for spaces")
    if len(found) < 2:
        raise DataError(f"the training data have {'one label only: ' if found else 'no label'}{', '.join(found)}")
    numbers = all(WHOLE.fullmatch(label) for label in found)
    return names or tuple(sorted(found, key=int) if numbers else sorted(found))


def number_classes(name: str, labels: Iterable[str], classes: Sequence[str]) -> list[int]:
    """Return the number of each label among ``classes``.

    Raises:
        DataError: the training data don't have one.
    """
    numbers, found = {label: number for number, label in enumerate(classes)}, list(labels)
    if unknown := next((label for label in found if label not in numbers), None):
        raise DataError(f"{name}: the label {unknown!r} isn't in the training data, which has {listed(classes)}")
    return [numbers[label] for label in found]


def listed(names: Sequence[str]) -> str:
    """Return names as a list for a message, at most `SHOWN` of them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
