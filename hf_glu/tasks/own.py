"""Making a task of a user's own data: their columns, and what is predicted of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as shortened
from typing import TYPE_CHECKING

from hf_glu.checkpoint.writing import user_path
from hf_glu.config.extras import need
from hf_glu.errors import DataError, OptionError
from hf_glu.tasks.checking import LABEL, Splits, check_columns
from hf_glu.tasks.choices import OwnOptions
from hf_glu.tasks.columns import Columns, find_columns
from hf_glu.tasks.files import check_all_used, find_splits, read_files
from hf_glu.tasks.inputs import columns, words
from hf_glu.tasks.labels import SCORES, LabelTraits, read_labels
from hf_glu.tasks.lists import read_several, read_tags
from hf_glu.tasks.pairs import read_pairs
from hf_glu.tasks.prompts import as_it_is, fields
from hf_glu.tasks.table import Task

if TYPE_CHECKING:
    from datasets import Dataset

Read = Callable[[str, Splits, Columns, OwnOptions], tuple[LabelTraits, Splits]]


def own_files(
    source: str | os.PathLike[str], validation: str | os.PathLike[str] | None = None
) -> dict[str, list[Path]]:
    """Find the files of each split of a user's data, with ``validation`` as the validation split.

    Raises:
        DataError: a folder without a file of training data, or with one of no split.
    """
    path = user_path(source)
    files = find_splits(path, ("train", "validation")) if path.is_dir() else {"train": [path]}
    if path.is_dir():
        given = {} if validation is None else {"given": [user_path(validation)]}
        check_all_used(path, {**files, **given})
    if validation is not None:
        files["validation"] = [user_path(validation)]
    if "train" not in files:
        raise DataError(f"{path} has no train file")
    return files


def own_task(
    source: str | os.PathLike[str],
    chosen: OwnOptions | None = None,
    *,
    validation: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> tuple[Task, Splits]:
    """Make a task of a user's own data; return it with its splits, whose label is in the column `LABEL`.

    Where ``chosen`` doesn't say otherwise, the text is in a column ``sentence`` or ``text``, pairs in two of
    `hf_glu.tasks.columns.TEXTS`, the label in ``label``. Labels are classes, told apart by all of their letters, in the
    order that the file declares, else that of numbers or of the alphabet; numbers with fractions are scores, and the
    task a regression. Lists of words with lists of tags are tokens to classify; ``source`` and ``target`` are texts to
    read and to write. Without validation data a tenth is split off by ``seed``.

    Args:
        source, validation: as of `own_files`.
        chosen: the columns, and what is predicted.

    Raises:
        DataError: no such file, an unknown format, columns that aren't there or would be left out, labels that aren't
            what they should be.
        OptionError: options that exclude one another.
    """
    need("datasets", what="a data set")
    chosen = chosen or OwnOptions()
    splits: Splits = dict(read_files(own_files(source, validation)))
    name = Path(source).stem
    for split, data in splits.items():
        check_columns(f"{name}, split {split}", data, ())
    if len(splits["train"]) < 2 and "validation" not in splits:
        raise DataError(f"{name}: there is one row only, which can't be split into training and validation data")
    found = find_columns(str(source), splits["train"], chosen)
    splits = {split: found.read(f"{name}, split {split}", data) for split, data in splits.items()}
    if chosen.metrics and found.problem != "text":
        raise OptionError(f"metrics are of texts that are written, and {name} has labels")
    traits, splits = READ.get(found.problem, _read_texts)(name, splits, found, chosen)
    if "validation" not in splits:
        parts = splits["train"].train_test_split(test_size=0.1, seed=seed)
        splits = {"train": parts["train"], "validation": parts["test"]}
    if traits is SCORES and len(set(splits["validation"][LABEL])) < 2:
        raise DataError(f"{name}: the validation data have one score only, so that no prediction can be scored")
    task = Task(
        name=name,
        columns=found.texts,
        inputs=words(found.texts[0]) if found.problem == "tokens" else columns(*found.texts),
        prompt=as_it_is(*found.texts)
        if found.problem == "text"
        else fields(name, **{text: text for text in found.texts}),
        test=(),
        **traits,
    )
    return task, splits


def _read_texts(name: str, splits: Splits, found: Columns, chosen: OwnOptions) -> tuple[LabelTraits, Splits]:
    """Read texts with a class, several classes or a score for each."""
    for split, data in splits.items():
        _check_texts(f"{name}, split {split}", data, found.texts)
    if found.problem == "multi":
        return read_several(name, splits, separator=chosen.label_separator)
    return read_labels(name, splits, problem=found.problem)


def _read_tokens(name: str, splits: Splits, found: Columns, chosen: OwnOptions) -> tuple[LabelTraits, Splits]:
    """Read words with a tag for each."""
    if len(found.texts) > 1:
        raise OptionError(f"words with tags are in one column, not in {' and '.join(found.texts)}: give one of them")
    return read_tags(name, splits, found.texts[0])


def _read_pairs(name: str, splits: Splits, found: Columns, chosen: OwnOptions) -> tuple[LabelTraits, Splits]:
    """Read texts with a text to write for each."""
    return read_pairs(name, splits, found, chosen.named_metrics)


# problem -> what reads it; any other is of texts with labels
READ: dict[str | None, Read] = {"tokens": _read_tokens, "text": _read_pairs}


def _check_texts(where: str, data: Dataset, chosen: tuple[str, ...]) -> None:
    for column in chosen:
        for number, value in enumerate(data[column], start=1):
            if not isinstance(value, (str, int, float)):
                more = "; words with tags are --problem tokens" if isinstance(value, list) else ""
                raise DataError(f"{where}, row {number}: {column!r} is no text, but {shortened(value)}{more}")
