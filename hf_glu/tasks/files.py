"""Reading data set files: folders as on the Hub, or single csv, tsv, json(l), parquet and conll files."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

# names that files give a split, beside the split's own
OTHER_NAMES = {"validation": ("val", "dev"), "train": (), "test": ()}


def find_splits(folder: Path, splits: tuple[str, ...], *, config: str = "") -> dict[str, list[Path]]:
    """Find the files of each split in ``folder``, or in its subfolder ``config`` or ``data``.

    A file belongs to a split whose name it starts with: ``train-00000-of-00002.parquet``, ``val.jsonl``.

    Raises:
        DataError: no folder, or no file for any split.
    """
    if not folder.is_dir():
        raise DataError(f"there is no dataset folder {folder}")
    places = [folder / config] if config and (folder / config).is_dir() else [folder, folder / "data"]
    files = [path for place in places for path in sorted(place.glob("*")) if path.suffix in READERS]
    found: dict[str, list[Path]] = {}
    for split in splits:
        names = (split, *OTHER_NAMES.get(split, ()))
        mine = [path for path in files if any(_stem(path) == name for name in names)]
        if mine:
            found[split] = mine
    if not found:
        raise DataError(
            f"{places[0]} has no file of the splits {', '.join(splits)} ({', '.join(READERS)}), such as train.jsonl"
        )
    return found


def _stem(path: Path) -> str:
    """Return the name of a file without its suffix and number: ``train`` for ``train-00000-of-00001.parquet``."""
    return path.name.split(".")[0].split("-")[0]


def read_files(files: Mapping[str, list[Path]]) -> dict[str, Dataset]:
    """Read the files of each split, without a cache and without guessing types.

    A csv's values are texts (``NA`` and ``01``, too), an empty one is None; json's and parquet's have their own types.

    Raises:
        DataError: a file that is missing, of an unknown kind, or can't be read; kinds that are mixed.
    """
    from datasets import concatenate_datasets

    every = [path for paths in files.values() for path in paths]
    for path in every:
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        if path.suffix not in READERS or path.suffix != every[0].suffix:
            raise DataError(f"{path}: files must be all of one kind of {', '.join(READERS)}")
    read = {}
    for split, paths in files.items():
        parts = []
        for path in paths:
            try:
                parts.append(READERS[path.suffix](path))
            except (ValueError, TypeError, OverflowError, RecursionError, OSError) as error:
                cause = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise DataError(f"{path} can't be read as {path.suffix[1:]}: {cause}") from error
        try:
            read[split] = concatenate_datasets(parts)
        except ValueError as error:
            raise DataError(f"{paths[0]} and {paths[-1]} have different columns") from error
    return read


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content.

    Raises:
        DataError: it can't be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error


def _read_table(path: Path, **options: str | int) -> Dataset:
    """Read a csv or tsv file; a header of fewer columns than a row has is an error, not an index."""
    import pandas
    from datasets import Dataset

    frame = pandas.read_csv(
        path, header=None, dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8-sig", **options
    )
    cells = frame.astype(object).where(frame.notna(), None)
    header = ["" if name is None else str(name).strip() for name in cells.iloc[0]]
    if len(set(header)) < len(header):
        raise ValueError(f"the header has a column twice: {', '.join(header)}")
    return Dataset.from_dict({name: cells[number].iloc[1:].tolist() for number, name in enumerate(header)})


def _read_json(path: Path) -> Dataset:
    """Read one list of objects, or an object a line."""
    from datasets import Dataset

    rows = _rows(path.read_text(encoding="utf-8-sig"))
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError('rows must be objects, such as {"text": ..., "label": ...}')
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Dataset.from_dict(columns, on_mixed_types="use_json")


def _rows(text: str) -> list[JsonObject]:
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return whole if isinstance(whole, list) else [whole]


def _read_parquet(path: Path) -> Dataset:
    from datasets import Dataset
    from pyarrow.parquet import ParquetFile

    return Dataset(ParquetFile(path).read())


def _read_conll(path: Path) -> Dataset:
    """Read words with tags: a word a line, with its tag in the last column; an empty line ends a sentence."""
    from datasets import Dataset

    rows: list[tuple[list[str], list[str]]] = [([], [])]
    count = 0
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            rows.append(([], []))
            continue
        cells = line.strip().split("\t" if "\t" in line else None)
        count = count or len(cells)
        if len(cells) < 2 or len(cells) != count:
            raise ValueError(
                f"line {number} has {len(cells)} columns, not {max(count, 2)}: a word a line, its tag last"
            )
        rows[-1][0].append(cells[0])
        rows[-1][1].append(cells[-1])
    filled = [row for row in rows if row[0]]
    return Dataset.from_dict({"tokens": [words for words, _ in filled], "tags": [tags for _, tags in filled]})


READERS: dict[str, Callable[[Path], Dataset]] = {
    ".csv": _read_table,
    ".tsv": partial(_read_table, sep="\t", quoting=csv.QUOTE_NONE),
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
    ".conll": _read_conll,
    ".txt": _read_conll,
}
