"""Reading data set files: folders as on the Hub, or single csv, tsv, json(l), parquet and conll files."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

# names that files give a split, beside the split's own
OTHER_NAMES = {"val": "validation", "valid": "validation", "dev": "validation", "eval": "validation"}
# train.jsonl, or a part as on the Hub: train-00000-of-00002.parquet, perhaps with a hash
_NAME = re.compile(r"(?P<split>.+?)(-(?P<part>\d+)-of-(?P<parts>\d+)(-[0-9a-f]{16})?)?", re.DOTALL)
_MAYBE_DATA = (".txt", ".json")  # else notes and facts about the data, beside files of another kind


def find_splits(folder: Path, splits: tuple[str, ...], *, config: str = "") -> dict[str, list[Path]]:
    """Find the files of each split in ``folder``, or in its subfolder ``config`` or ``data``.

    A file is a split's by its whole name, in any case: ``train-00000-of-00002.parquet``, ``val.jsonl``.

    Raises:
        DataError: no folder, no file for any split, or several for one that aren't its numbered parts.
    """
    places, files = _data_files(folder, config)
    found: dict[str, list[Path]] = {}
    for split in splits:
        mine = [path for path in files if _split_of(path) == split.lower()]
        if len({_whole(path) for path in mine}) > 1:
            raise DataError(f"{mine[0]} and {mine[1]} are both {split}: leave one of them, or number them as its parts")
        if mine:
            found[split] = mine
    if not found:
        raise DataError(
            f"{places[0]} has no file of the splits {', '.join(splits)} ({', '.join(READERS)}), such as train.jsonl"
        )
    return found


def check_all_used(folder: Path, files: Mapping[str, list[Path]]) -> None:
    """Raise DataError for a data file in ``folder`` that is of none of ``files``, by split, and no test's."""
    used = [path.absolute() for paths in files.values() for path in paths]
    kinds = {path.suffix.lower() for path in used}
    for path in _data_files(folder)[1]:
        kind = path.suffix.lower()
        if path.absolute() in used or _split_of(path) == "test" or (kind in _MAYBE_DATA and kind not in kinds):
            continue
        raise DataError(
            f"{path} belongs to no split: files are called train, validation (or {', '.join(OTHER_NAMES)}) or test, "
            "numbered or not; rename it, give it as validation, or take it out of the folder"
        )


def _data_files(folder: Path, config: str = "") -> tuple[list[Path], list[Path]]:
    """Return where data files of a folder are looked for, and those that are there."""
    if not folder.is_dir():
        raise DataError(f"there is no dataset folder {folder}")
    places = [folder / config] if config and (folder / config).is_dir() else [folder, folder / "data"]
    every = [path for place in places for path in sorted(place.glob("*")) if path.suffix.lower() in READERS]
    return places, [path for path in every if not path.name.startswith((".", "dataset_info"))]


def _split_of(path: Path) -> str:
    """Return the name of a file's split: ``train`` for ``train-00000-of-00001.parquet``."""
    name = _named(path)["split"].lower()
    return OTHER_NAMES.get(name, name)


def _whole(path: Path) -> tuple[Path, ...]:
    """Return what the parts of one split have in common; of a file without a number itself."""
    name = _named(path)
    whole = (path.parent, Path(f"{name['split']}-of-{name['parts']}{path.suffix}"))
    return whole if name["part"] else (path,)


def _named(path: Path) -> re.Match[str]:
    found = _NAME.fullmatch(path.stem)
    assert found is not None
    return found


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
    read = partial(json.loads, parse_constant=lambda _: None)  # NaN is how pandas writes what is missing
    try:
        whole = read(text)
    except json.JSONDecodeError:
        return [read(line) for line in text.split("\n") if line.strip()]
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
