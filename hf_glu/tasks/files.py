"""Dataset files on disk: the layout of a dataset on the Hub, or single csv, tsv, json(l) and parquet files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hf_glu.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# names that files give a split, beside the split's own
OTHER_NAMES = {"validation": ("val", "dev"), "train": (), "test": ()}


def find_splits(folder: Path, splits: tuple[str, ...], *, config: str = "") -> dict[str, list[Path]]:
    """Return the files of each split in ``folder``, or in its subfolder ``config`` or ``data``.

    A file belongs to a split whose name it starts with: ``train-00000-of-00002.parquet``, ``val.jsonl``.

    Raises:
        DataError: no folder, or no file for any split.
    """
    if not folder.is_dir():
        raise DataError(f"there is no dataset folder {folder}")
    places = [folder / config] if config and (folder / config).is_dir() else [folder, folder / "data"]
    files = [path for place in places for path in sorted(place.glob("*")) if path.suffix in FORMATS]
    found: dict[str, list[Path]] = {}
    for split in splits:
        names = (split, *OTHER_NAMES.get(split, ()))
        mine = [path for path in files if any(_stem(path) == name for name in names)]
        if mine:
            found[split] = mine
    if not found:
        raise DataError(
            f"{places[0]} has no file of the splits {', '.join(splits)} ({', '.join(FORMATS)}), such as train.jsonl"
        )
    return found


def _stem(path: Path) -> str:
    """Return the name of a file without its suffix and number: ``train`` for ``train-00000-of-00001.parquet``."""
    return path.name.split(".")[0].split("-")[0]


def read_files(files: Mapping[str, list[Path]]) -> dict[str, Dataset]:
    """Read the files of each split.

    Raises:
        DataError: a file that is missing, of an unknown kind, or can't be read; kinds that are mixed.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    every = [path for paths in files.values() for path in paths]
    for path in every:
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        if path.suffix not in FORMATS or path.suffix != every[0].suffix:
            raise DataError(f"{path}: files must be all of one kind of {', '.join(FORMATS)}")
    suffix = every[0].suffix
    options = {"sep": "\t", "quoting": 3} if suffix == ".tsv" else {}
    read = {}
    for split, paths in files.items():  # one by one: the splits may differ in their columns
        try:
            read[split] = load_dataset(FORMATS[suffix], data_files=[str(path) for path in paths], **options)["train"]
        except (DatasetGenerationError, ValueError, OSError) as error:
            cause = str(error.__cause__ or error).splitlines()[0]
            raise DataError(f"{paths[0]} can't be read as {suffix[1:]}: {cause}") from error
    return read
