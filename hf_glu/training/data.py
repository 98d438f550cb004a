"""Labelled sentences from local files or Hub datasets, tokenized and in batches of like lengths."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_glu.errors import DataError, nearest
from hf_glu.hub import reachable

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# task: dataset on the Hub, its configuration, text columns, validation split
TASKS: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "cola": ("nyu-mll/glue", "cola", ("sentence",), "validation"),
    "sst2": ("nyu-mll/glue", "sst2", ("sentence",), "validation"),
    "mrpc": ("nyu-mll/glue", "mrpc", ("sentence1", "sentence2"), "validation"),
    "rte": ("nyu-mll/glue", "rte", ("sentence1", "sentence2"), "validation"),
}
_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_TEXT_COLUMNS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("sentence",), ("text",))
_LABEL_COLUMN = "label"


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A classification task.

    Attributes:
        train, validation: columns ``text`` (and ``pair``) and ``label``, an index into ``labels``.
        labels: their names.
    """

    train: Dataset
    validation: Dataset
    labels: tuple[str, ...]


def load_task(task: str) -> Examples:
    """Load one of `TASKS` from the Hub.

    Raises:
        DataError: no such task, or the Hub can't be reached.
    """
    from datasets import load_dataset

    if task not in TASKS:
        raise DataError(f"unknown task {task!r}; {nearest(task, TASKS)}; or give local files with --data")
    dataset, configuration, columns, validation = TASKS[task]
    if not reachable():
        raise DataError(f"{dataset} is on the Hub, which can't be reached: give local files with --data")
    return _examples(load_dataset(dataset, configuration), columns, validation)


def load_files(
    source: str | os.PathLike[str], *, validation: str | os.PathLike[str] | None = None, seed: int = 0
) -> Examples:
    """Load labelled sentences from a csv, tsv, json(l) or parquet file, or a folder with train and validation files.

    The text is in a column ``sentence`` or ``text`` (pairs: ``sentence1``, ``sentence2``), the label in ``label``.
    A single file is split 9 : 1 by ``seed``.

    Raises:
        DataError: no such file, an unknown format, or columns that aren't there.
    """
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetGenerationError

    files = _find_files(Path(source), Path(validation) if validation else None)
    suffix = files["train"].suffix
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    try:
        loaded = load_dataset(_FORMATS[suffix], data_files={key: str(path) for key, path in files.items()}, **options)
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise DataError(f"{source} can't be read as {suffix[1:]}: {str(error).splitlines()[0]}") from error
    if "validation" not in loaded:
        parts = loaded["train"].train_test_split(test_size=0.1, seed=seed)
        loaded = DatasetDict(train=parts["train"], validation=parts["test"])
    columns = next((names for names in _TEXT_COLUMNS if set(names) <= set(loaded["train"].column_names)), None)
    if columns is None:
        raise DataError(f"{source} has the columns {loaded['train'].column_names}: call the text `sentence` or `text`")
    return _examples(loaded, columns, "validation")


def _find_files(source: Path, validation: Path | None) -> dict[str, Path]:
    if source.is_dir():
        found = {
            split: path
            for split, names in (("train", ("train",)), ("validation", ("validation", "dev", "test")))
            for name in reversed(names)
            for path in sorted(source.glob(f"{name}.*"))
            if path.suffix in _FORMATS
        }
        if "train" not in found:
            raise DataError(f"{source} has no train file ({', '.join('train' + suffix for suffix in _FORMATS)})")
    else:
        found = {"train": source}
    if validation is not None:
        found["validation"] = validation
    for path in found.values():
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        if path.suffix != found["train"].suffix or path.suffix not in _FORMATS:
            raise DataError(f"{path}: files must be all of one kind of {', '.join(_FORMATS)}")
    return found


def _examples(loaded: DatasetDict, columns: Sequence[str], validation: str) -> Examples:
    """Bring the splits into one form: columns ``text``, ``pair`` where there are pairs, and ``label``."""
    splits = {"train": loaded["train"], "validation": loaded[validation]}
    for split, data in splits.items():
        if missing := sorted({_LABEL_COLUMN, *columns} - set(data.column_names)):
            raise DataError(f"the {split} data has no column {missing[0]!r}, but {data.column_names}")
        if any(value is None for column in (*columns, _LABEL_COLUMN) for value in data[column]):
            raise DataError(f"some rows of the {split} data have an empty text or label")
    names, index = _labels(splits["train"])
    renamed = dict(zip(("text", "pair"), columns, strict=False))

    def row(example: dict[str, Any]) -> dict[str, Any]:
        texts = {name: str(example[column]) for name, column in renamed.items()}
        return {**texts, "label": index(example[_LABEL_COLUMN])}

    shaped = {split: data.map(row, remove_columns=data.column_names) for split, data in splits.items()}
    return Examples(train=shaped["train"], validation=shaped["validation"], labels=names)


def _labels(train: Dataset) -> tuple[tuple[str, ...], Callable[[Any], int]]:
    """Return the labels' names, and the function from a value in the data to its index."""
    feature = train.features[_LABEL_COLUMN]
    declared = getattr(feature, "names", None)
    names = tuple(declared or sorted({str(label) for label in train[_LABEL_COLUMN]}))
    if len(names) < 2:
        raise DataError(f"the training data has one label only: {', '.join(names)}")

    def index(label: Any) -> int:
        if declared:
            return int(label)
        if str(label) not in names:
            raise DataError(f"the validation data has the label {label!r}, which the training data lacks")
        return names.index(str(label))

    return names, index
