"""Reading plain text: files of several kinds, folders, patterns and sets of the Hub, as documents."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from hf_glu.checkpoint.writing import reason_of, user_path
from hf_glu.errors import DataError, HfGluError, OptionError, nearest
from hf_glu.tasks.files import hash_file

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Documents: TypeAlias = "Dataset | IterableDataset"

UTF8 = "utf-8-sig"  # without a mark at its beginning
TEXT = "text"  # the only column of what is read
STRING, LARGE = "string", "large_string"  # kinds of text: pandas and polars write the second
# a file's ending -> the builder of datasets that reads it
BUILDERS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


# what lies beside the texts in a folder, and says something of them
NOTES = frozenset({"readme", "license", "dataset_info", "dataset_infos"})


def find_files(names: Sequence[str]) -> list[Path]:
    """Return the files that names, folders (but for notes and hidden ones) and patterns mean, each once, in order.

    Raises:
        DataError: nothing is there, or a file is of an unknown kind.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = user_path(name)
        if path.is_dir():
            files = [each for each in sorted(path.rglob("*")) if _is_text(each.relative_to(path)) and each.is_file()]
        elif path.is_file():
            files = [path]
        else:
            files = [Path(each) for each in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(each)]
        if not files:
            raise DataError(f"{name} has no file of {', '.join(BUILDERS)}" if path.is_dir() else f"there is no {name}")
        for file in files:
            if file.suffix not in BUILDERS:
                raise DataError(f"{file} is of no known kind: {', '.join(BUILDERS)}")
            found[file.absolute()] = None
    return list(found)


def _is_text(path: Path) -> bool:
    """Return whether a file of a folder, by its path in there, is one of its texts."""
    hidden = any(part.startswith(".") for part in path.parts)  # such as .ipynb_checkpoints
    return path.suffix in BUILDERS and not hidden and path.stem.lower() not in NOTES


def is_local(names: Sequence[str]) -> bool:
    """Return whether ``names`` are files here, and not a data set of the Hub: ``user/name[:config]``."""
    if len(names) != 1 or names[0].startswith((".", "/", "~")) or any(sign in names[0] for sign in "*?["):
        return True
    path = user_path(names[0])
    return path.exists() or path.suffix in BUILDERS or names[0].count("/") > 1


def read_documents(names: Sequence[str], *, column: str | None = None, stream: bool = False) -> Documents:
    """Read documents: a row each, whose only column is `TEXT`.

    In a .txt file documents are separated by empty lines; elsewhere a row is one.

    Args:
        names: files, folders, patterns; or one data set of the Hub, of which the split ``train`` is read.
        column: the text's; None: ``text``, or the only one.
        stream: whether the rows are read when they are needed.

    Raises:
        DataError: they can't be read, or there is no such column.
    """
    parts = _local(names, stream=stream) if is_local(names) else [_of_hub(names[0], stream=stream)]
    parts = [_only_text(part, column) for part in parts]
    if len(parts) == 1:
        return parts[0]
    from datasets import Value, concatenate_datasets

    alike = (part.cast_column(TEXT, Value(STRING)) if _kind(part, TEXT) == LARGE else part for part in parts)
    return concatenate_datasets(list(alike))  # which takes one kind of strings only


def _local(names: Sequence[str], *, stream: bool) -> list[Documents]:
    files: dict[str, list[str]] = {}
    for file in find_files(names):
        files.setdefault(BUILDERS[file.suffix], []).append(str(file))
    from datasets import load_dataset
    from datasets.config import HF_DATASETS_CACHE

    found = []
    for builder, paths in files.items():
        if not any(os.path.getsize(path) for path in paths):
            raise DataError(f"{paths[0]} is empty: there is no text in it")
        options: dict[str, Any] = {"sample_by": "paragraph", "encoding": UTF8} if builder == "text" else {}
        if not stream:  # datasets' cache goes by name and time: here by content, so that it is never stale
            content = "".join(hash_file(Path(path)) for path in paths)
            options["cache_dir"] = f"{HF_DATASETS_CACHE}/hf_glu/{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        try:
            options |= _as_texts(paths) if builder == "csv" else {}
            found.append(load_dataset(builder, data_files=paths, split="train", streaming=stream, **options))
        except Exception as error:  # of pandas, pyarrow, json and datasets
            raise DataError(f"{paths[0]} can't be read as {builder}: {_cause(error)}") from error
    return found


def _as_texts(paths: Sequence[str]) -> dict[str, Any]:
    """Return how a csv's values are read as the texts that they are: ``NA``, ``null`` and ``007``, too."""
    import pandas
    from datasets import Features, Value

    first = next(path for path in paths if os.path.getsize(path))
    columns = pandas.read_csv(first, nrows=0, encoding=UTF8).columns
    features = Features({str(name): Value(STRING) for name in columns})
    return {"features": features, "keep_default_na": False, "encoding": UTF8}


def _of_hub(name: str, *, stream: bool) -> Documents:
    from datasets import load_dataset

    repository, _, config = name.partition(":")
    try:
        return load_dataset(repository, config or None, split="train", streaming=stream)
    except Exception as error:
        raise DataError(f"there is no file {name}, and no data set of the Hub can be had: {_cause(error)}") from error


@contextmanager
def reading_rows() -> Iterator[None]:
    """Turn what goes wrong as the rows of a stream are read, in the block, into one line.

    Raises:
        DataError: they can't be read.
    """
    try:
        yield
    except HfGluError:
        raise
    except Exception as error:  # as above
        raise DataError(f"the text can't be read: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    return reason_of(error.__cause__ or error)


def _only_text(documents: Documents, column: str | None) -> Documents:
    with reading_rows():
        columns = list(documents.column_names or next(iter(documents), {}))
    chosen = column or (TEXT if TEXT in columns else columns[0] if len(columns) == 1 else None)
    if chosen is None:
        raise DataError(f"which column is the text? Give text_column: {', '.join(columns)}")
    if chosen not in columns:
        raise DataError(f"there is no column {chosen!r}; {nearest(chosen, columns)}")
    if (kind := _kind(documents, chosen)) not in (STRING, LARGE):
        raise DataError(f"column {chosen!r} has {kind}, no text")
    documents = documents.select_columns([chosen])
    if chosen != TEXT:
        documents = documents.rename_column(chosen, TEXT)
    return documents.filter(_has_text)


def _kind(documents: Documents, column: str) -> str:
    """Return the kind of a column's values, where it is known before any is read."""
    return str(getattr((documents.features or {}).get(column), "dtype", STRING))


def _has_text(row: dict[str, str | None]) -> bool:
    return bool(row[TEXT] and row[TEXT].strip())  # type: ignore[union-attr]


def split_documents(documents: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split documents into those to train on and those to validate on, each in the order of the data.

    Raises:
        OptionError: there is only one.
    """
    import numpy as np

    count = len(documents)
    held = max(1, round(count * share))
    if held >= count:
        raise OptionError(f"there is {count} document, of which none is left to validate on: give validation, a file")
    chosen = np.random.default_rng(seed).permutation(count)
    return documents.select(sorted(chosen[held:])), documents.select(sorted(chosen[:held]))
