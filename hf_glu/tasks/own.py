"""Making a task of a user's own labelled texts: their columns, and whether labels are classes or scores."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Required, TypedDict

from hf_glu.checkpoint.writing import user_path
from hf_glu.config.extras import need
from hf_glu.errors import DataError
from hf_glu.tasks.checking import LABEL, Splits, check_columns, named_labels, with_labels
from hf_glu.tasks.files import find_splits, read_files
from hf_glu.tasks.inputs import columns
from hf_glu.tasks.prompts import fields
from hf_glu.tasks.table import Task, TaskForm

if TYPE_CHECKING:
    from datasets import Dataset

# columns that are the text, pairs first
TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("text", "text2"),
    ("text1", "text2"),
    ("text", "text_pair"),
    ("text_a", "text_b"),
    ("sentence",),
    ("text",),
)
# columns that nobody takes for a text; `source` names the kind of text in reports
OTHERS = {"id", "idx", "index", "guid", "uid", "source", "label_text", "label_name", ""}
WHOLE = re.compile(r"0|-?[1-9][0-9]*")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
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


def own_files(
    source: str | os.PathLike[str], validation: str | os.PathLike[str] | None = None
) -> dict[str, list[Path]]:
    """Find the files of each split of a user's data, with ``validation`` as the validation split.

    Raises:
        DataError: a folder without a file of training data.
    """
    path = user_path(source)
    files = find_splits(path, ("train", "validation")) if path.is_dir() else {"train": [path]}
    if validation is not None:
        files["validation"] = [user_path(validation)]
    if "train" not in files:
        raise DataError(f"{path} has no train file")
    return files


def own_task(
    source: str | os.PathLike[str],
    *,
    validation: str | os.PathLike[str] | None = None,
    texts: str | None = None,
    seed: int = 0,
) -> tuple[Task, Splits]:
    """Make a task of a user's own labelled texts; return it with its splits.

    The text is in a column ``sentence`` or ``text``, pairs in two of `TEXTS`, the label in ``label``. Labels are
    classes, told apart by all of their letters, in the order that the file declares, else that of numbers or of the
    alphabet; numbers with fractions are scores, and the task a regression. Without validation data a tenth is split off
    by ``seed``.

    Args:
        source, validation: as of `own_files`.
        texts: the one or two columns that are the text, ``headline,body``; None: by their names.

    Raises:
        DataError: no such file, an unknown format, columns that aren't there or would be left out, labels that are
            neither classes nor scores.
    """
    need("datasets", what="a data set")
    splits: Splits = dict(read_files(own_files(source, validation)))
    name = Path(source).stem
    for split, data in splits.items():
        check_columns(f"{name}, split {split}", data, ())
    if len(splits["train"]) < 2 and "validation" not in splits:
        raise DataError(f"{name}: there is one row only, which can't be split into training and validation data")
    chosen = _text_columns(str(source), splits["train"], texts)
    for split, data in splits.items():
        check_columns(f"{name}, split {split}", data, (*chosen, LABEL))
        _check_texts(f"{name}, split {split}", data, chosen)
    kind, splits = _read_labels(name, splits)
    if "validation" not in splits:
        parts = splits["train"].train_test_split(test_size=0.1, seed=seed)
        splits = {"train": parts["train"], "validation": parts["test"]}
    if kind is SCORES and len(set(splits["validation"][LABEL])) < 2:
        raise DataError(f"{name}: the validation data have one score only, so that no prediction can be scored")
    task = Task(
        name=name,
        columns=chosen,
        inputs=columns(*chosen),
        prompt=fields(name, **{text: text for text in chosen}),
        test=(),
        **kind,
    )
    return task, splits


def _read_labels(name: str, splits: Splits) -> tuple[LabelTraits, Splits]:
    """Decide between classes and scores; return the task's fields for that, and the splits with numbered labels."""
    labels = _stripped(name, {split: _labels(f"{name}, split {split}", data) for split, data in splits.items()})
    if _are_scores(name, [label for each in labels.values() for label in each]):
        scores = {split: with_labels(data, [float(label) for label in labels[split]]) for split, data in splits.items()}
        return SCORES, scores
    classes = _classes(name, splits["train"], labels["train"])
    numbers = {split: with_labels(data, _numbered(name, labels[split], classes)) for split, data in splits.items()}
    return {"labels": classes}, numbers


def _text_columns(source: str, train: Dataset, texts: str | None) -> tuple[str, ...]:
    """Return the columns that are the text; raise if another column has texts and nobody said to leave it out."""
    names = train.column_names
    if texts is not None:
        given = tuple(name.strip() for name in texts.split(","))
        if missing := [name for name in given if name not in names or name == LABEL]:
            raise DataError(f"{source} has no text column {missing[0]!r}, but {', '.join(names)}")
        if not 1 <= len(set(given)) == len(given) <= 2:
            raise DataError(f"texts are one column or two, such as text,text2, got {texts!r}")
        return given
    chosen = next((each for each in TEXTS if set(each) <= set(names)), None)
    if chosen is None or LABEL not in names:
        raise DataError(
            f"{source} has the columns {', '.join(names)}: call the text `sentence` or `text` (or name its "
            "column with --texts), the class `label`"
        )
    for name in names:
        if name not in (*chosen, LABEL) and name.lower() not in OTHERS and _has_text(train[name]):
            raise DataError(
                f"{source} has texts in {name!r} that would be left out: say which columns are read, such "
                f"as --texts {','.join(chosen)} or --texts {chosen[0]},{name}"
            )
    return chosen


def _has_text(values: Sequence[object]) -> bool:
    return any(isinstance(value, str) and not NUMBER.fullmatch(value) for value in values)


def _check_texts(where: str, data: Dataset, chosen: tuple[str, ...]) -> None:
    for column in chosen:
        for number, value in enumerate(data[column], start=1):
            if not isinstance(value, (str, int, float)):
                raise DataError(f"{where}, row {number}: {column!r} is no text, but {shortened(value)}")


def _labels(where: str, data: Dataset) -> list[str]:
    """Return the labels as they are written.

    Raises:
        DataError: a row without a label, or with several.
    """
    found = []
    for number, label in enumerate(named_labels(data), start=1):
        if label is None or label != label or (isinstance(label, str) and not label.strip()):  # NaN isn't itself
            raise DataError(f"{where}, row {number}: there is no label")
        if not isinstance(label, (str, int, float)):
            raise DataError(f"{where}, row {number}: the label {shortened(label)} isn't one class or score")
        found.append(str(label))
    return found


def _stripped(name: str, labels: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return labels without spaces around them; raise if two labels differ in spaces only."""
    spelled: dict[str, str] = {}
    for label in dict.fromkeys(label for each in labels.values() for label in each):
        if (other := spelled.setdefault(label.strip(), label)) != label:
            raise DataError(f"{name}: the labels {other!r} and {label!r} differ in spaces only")
    return {split: [label.strip() for label in each] for split, each in labels.items()}


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
            f"{name}: the labels are whole numbers written as fractions, {listed(sorted(kinds))}: write "
            "classes without the point; scores need a fraction somewhere"
        )
    return True


def _classes(name: str, train: Dataset, labels: list[str]) -> tuple[str, ...]:
    """Return the classes' names: in the order that the file declares, else of numbers, else of the alphabet."""
    declared = getattr(train.features[LABEL], "names", None)
    found = {str(label).strip() for label in declared or labels}
    if declared and len(found) < len(declared):
        raise DataError(f"{name}: two of the declared labels are the same but for spaces")
    if len(found) < 2:
        raise DataError(f"the training data has one label only: {', '.join(found)}")
    if declared:
        return tuple(str(label).strip() for label in declared)
    numbers = all(WHOLE.fullmatch(label) for label in found)
    return tuple(sorted(found, key=int) if numbers else sorted(found))


def _numbered(name: str, labels: list[str], classes: tuple[str, ...]) -> list[int]:
    numbers = {label: number for number, label in enumerate(classes)}
    if unknown := next((label for label in labels if label not in numbers), None):
        raise DataError(f"{name}: the label {unknown!r} isn't in the training data, which has {listed(classes)}")
    return [numbers[label] for label in labels]


def listed(names: Sequence[str]) -> str:
    """Return names as a list for a message, at most `SHOWN` of them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
