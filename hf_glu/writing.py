"""Whether a file or folder can be written, asked before the work whose result goes there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hf_glu.errors import CheckpointError

NAME = 255  # bytes in the name of a file, on the file systems that there are


def check_file(path: str | os.PathLike[str]) -> Path:
    """Return where a file is to be written; raise CheckpointError where it can't be."""
    target = _absolute(path)
    _check(path, target)
    if target.is_dir():
        raise CheckpointError(f"{path} can't be written: it is a folder")
    return target


def check_folder(path: str | os.PathLike[str]) -> Path:
    """Return where a folder is, or is to be; raise CheckpointError where nothing can be written in it."""
    target = _absolute(path)
    _check(path, target / "file")
    return target


def _absolute(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser().absolute()
    except (TypeError, RuntimeError) as error:  # RuntimeError: ~ of a user that there isn't
        raise CheckpointError(f"{path} can't be written: {error}") from error


def _check(path: str | os.PathLike[str], target: Path) -> None:
    """Write a nameless file into the folder of ``target``, or the nearest one above it that there is."""
    try:
        above = next(folder for folder in target.parents if folder.exists())
        if "\0" in str(target):
            raise ValueError("there is a zero byte in its name")
        if above.is_dir() and any(len(os.fsencode(name)) > NAME for name in target.relative_to(above).parts):
            raise CheckpointError(f"{str(path)[:NAME]} can't be written: a name has at most {NAME} bytes")
        with tempfile.TemporaryFile(dir=above) as file:
            file.write(b"0")
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{str(path)[:NAME]} can't be written: {reason}") from error
