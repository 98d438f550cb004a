"""Reading lists of labels in a user's own data: several classes for a row, or a tag for each of its words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import chain
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any

from hf_glu.config.extras import need
from hf_glu.errors import DataError
from hf_glu.tasks.checking import LABEL, Splits, with_labels
from hf_glu.tasks.labels import LabelTraits, is_missing, number_classes, order_classes, strip_classes

if TYPE_CHECKING:
    from datasets import Dataset

SEVERAL: LabelTraits = {"labels": (), "form": "multi", "metric": "multilabel", "main": ("micro_f1",)}
TAGS: LabelTraits = {"labels": (), "form": "tokens", "metric": "tags", "main": ("accuracy",)}
ENTITIES: LabelTraits = {"labels": (), "form": "tokens", "metric": "entities", "main": ("f1",)}
ENTITY_TAG = re.compile(r"O|[BIESLU]-.+")
# the place of a row, and its label -> the classes in it
ReadRow = Callable[[str, Any], Sequence[Any]]


def read_several(name: str, splits: Splits, *, separator: str | None = None) -> tuple[LabelTraits, Splits]:
    """Return the task's fields for several classes a row, and the splits with lists of class numbers.

    Args:
        name: the data's, for messages.
        splits: with lists of classes, none of which is an empty list.
        separator: what stands between the classes, where a row's are one text; an empty text is none of them.

    Raises:
        DataError: a row that has no such list, or names a class twice.
    """

    def row(where: str, label: Any) -> Sequence[Any]:
        if separator is not None and (label is None or isinstance(label, (str, int, float))):
            label = [] if is_missing(label) else [part.strip() for part in str(label).split(separator)]
        if isinstance(label, str):
            raise DataError(f"{where}: {shortened(label)} is one text: say what separates its classes, such as "
                            "--label-separator ';'")  # fmt: skip
        if not isinstance(label, list):
            raise DataError(f"{where}: {shortened(label)} is no list of classes; one without any is []")
        return label

    classes, numbers = _number_lists(name, splits, row)
    for split, rows in numbers.items():
        for place, each in enumerate(rows, start=1):
            if len(set(each)) < len(each):
                twice = next(classes[number] for number in each if each.count(number) > 1)
                raise DataError(
                    f"{name}, split {split}, row {place}: the class {twice!r} is there twice; a list has the classes "
                    "that hold, and no 0 and 1 for each"
                )
        numbers[split] = [sorted(each) for each in rows]
    return {**SEVERAL, "labels": classes}, _with_lists(splits, numbers)


def read_tags(name: str, splits: Splits, words: str) -> tuple[LabelTraits, Splits]:
    """Return the task's fields for a tag for each word, and the splits with lists of tag numbers.

    Tags such as ``B-place`` are entities'; others (parts of speech) are counted one by one.

    Args:
        name: the data's, for messages.
        splits: with lists of words and of tags.
        words: the column of the words.

    Raises:
        DataError: a row without words, or without a tag for each.
        MissingPackageError: seqeval isn't installed, which scores entities.
    """

    def row(where: str, label: Any) -> Sequence[Any]:
        if not isinstance(label, list):
            raise DataError(f"{where}: {shortened(label)} is no list of tags")
        return label

    for split, data in splits.items():
        _check_words(f"{name}, split {split}", data, words)
    tags, numbers = _number_lists(name, splits, row)
    entities = all(ENTITY_TAG.fullmatch(tag) for tag in tags)
    if entities:
        need("seqeval", what="scoring entities")
    return {**(ENTITIES if entities else TAGS), "labels": tags}, _with_lists(splits, numbers)


def _check_words(where: str, data: Dataset, column: str) -> None:
    """Raise DataError unless each row has a list of words, and as many tags."""
    for number, (words, tags) in enumerate(zip(data[column], data[LABEL], strict=True), start=1):
        if not isinstance(words, list) or not all(isinstance(word, (str, int, float)) for word in words):
            raise DataError(f"{where}, row {number}: {shortened(words)} in {column!r} is no list of words")
        if not words:
            raise DataError(f"{where}, row {number}: there are no words in {column!r}")
        if isinstance(tags, list) and len(words) != len(tags):
            raise DataError(f"{where}, row {number}: there are {len(words)} words but {len(tags)} tags")


def _number_lists(name: str, splits: Splits, row: ReadRow) -> tuple[tuple[str, ...], dict[str, list[list[int]]]]:
    """Return the classes in lists of labels, and each list as their numbers."""
    declared = _declared(splits["train"])
    lists = {split: _lists(f"{name}, split {split}", data, row) for split, data in splits.items()}
    flat = strip_classes(name, {split: list(chain.from_iterable(rows)) for split, rows in lists.items()})
    classes = order_classes(name, declared, flat["train"])
    numbered = {}
    for split, rows in lists.items():
        numbers = iter(number_classes(name, flat[split], classes))
        numbered[split] = [[next(numbers) for _ in each] for each in rows]
    return classes, numbered


def _lists(where: str, data: Dataset, row: ReadRow) -> list[list[str]]:
    """Return the labels in each list as they are written, by name where the file declares names."""
    names, found = _declared(data), []
    for number, label in enumerate(data[LABEL], start=1):
        place = f"{where}, row {number}"
        given = row(place, label)
        for each in given:
            unnamed = names is not None and each not in range(len(names))
            if unnamed or is_missing(each) or not isinstance(each, (str, int, float)):
                raise DataError(f"{place}: {shortened(each)} is no label")
        found.append([names[each] if names else str(each) for each in given])
    return found


def _declared(data: Dataset) -> list[str] | None:
    """Return the names that a file declares for the labels in its lists; None: it declares none."""
    return getattr(getattr(data.features[LABEL], "feature", None), "names", None)


def _with_lists(splits: Splits, numbers: dict[str, list[list[int]]]) -> Splits:
    return {split: with_labels(data, numbers[split]) for split, data in splits.items()}
