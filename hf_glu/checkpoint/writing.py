"""Writing files and folders whole or not at all, and reading paths as people write them."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_glu.checkpoint.stopping import check_stop, cleaned_up
from hf_glu.errors import CheckpointError, HfGluError

PARTIAL = ".hf_glu-partial-"  # what is being written is called so: nothing reads it, and what a kill leaves is known
NAME = 255  # bytes in the name of a file, on the file systems that there are
_count = itertools.count()
# how libraries that write by themselves (Rust, C++) tell of a full disk
_OF_LIBRARIES = ("os error", "inline_container", "file write failed")


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave, with ``~`` and ``~user`` expanded.

    Raises:
        CheckpointError: no path can be like that.
    """
    try:
        found = Path(path).expanduser()
        os.fsencode(found)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is no path: {error}") from error
    if "\0" in str(found):
        raise CheckpointError(f"{str(path)!r} is no path: it has a null character")
    return found


def check_file(path: str | os.PathLike[str]) -> Path:
    """Check that a file can be written at ``path``; return its absolute path.

    Raises:
        CheckpointError: it can't be: asked before the work whose result goes there.
    """
    target = _target(path)
    _try(target)
    if target.is_dir():
        raise CheckpointError(f"{path} can't be written: Is a directory")
    return target


def check_folder(path: str | os.PathLike[str]) -> Path:
    """Check that files can be written in the folder ``path``, which need not exist; return its absolute path.

    Raises:
        CheckpointError: nothing can be written in it: asked before the work whose results go there.
    """
    target = _target(path)
    _try(target / "file")
    return target


def _target(path: str | os.PathLike[str]) -> Path:
    try:
        return user_path(path).absolute()
    except CheckpointError as error:
        raise CheckpointError(f"it can't be written: {error}") from error


def _try(target: Path) -> None:
    """Write a temporary file into the folder of ``target``, or into the nearest existing folder above it."""
    with writing(str(target)[:NAME]):
        above = next(folder for folder in target.parents if folder.exists())
        if above.is_dir() and any(len(os.fsencode(name)) > NAME for name in target.relative_to(above).parts):
            raise CheckpointError(f"{str(target)[:NAME]} can't be written: a name has at most {NAME} bytes")
        with tempfile.TemporaryFile(dir=above) as file:
            file.write(b"0")


def reason_of(error: BaseException) -> str:
    """Return the reason of an error of the disk in a few words."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def writing(target: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of the disk inside of the block into one CheckpointError that names ``target``."""
    try:
        yield
    except HfGluError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not any(sign in str(error) for sign in _OF_LIBRARIES):
            raise
        raise CheckpointError(f"{target} can't be written: {reason_of(error)}") from error


def partial_name() -> str:
    """Return a short name, new in this process, for what isn't written to its end yet."""
    return f"{PARTIAL}{os.getpid()}-{next(_count)}"


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target``; what is written there replaces ``target`` at the end of the block, or vanishes.

    Raises:
        CheckpointError: it can't be written; ``target`` is as it was.
    """
    with writing(target), cleaned_up():
        real = Path(os.path.realpath(target))  # what a link points to is written, not the link
        if real.exists() and not real.is_file():  # a device or a pipe is written to, a folder refuses
            yield real
            return
        partial = real.parent / partial_name()
        try:
            yield partial
            sync(partial)
            check_stop()
            os.replace(partial, real)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(real.parent)


def write_text(target: Path, text: str) -> None:
    """Write a text file whole or not at all; names that aren't UTF-8 are escaped in it.

    Raises:
        CheckpointError: it can't be written.
    """
    with whole_file(target) as partial:
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))


def sync(path: Path) -> None:
    """Flush a file, or all files of a folder, to the disk."""
    for each in [*path.rglob("*"), path] if path.is_dir() else [path]:
        if each.is_file() and not each.is_symlink():
            with each.open("rb") as file:
                os.fsync(file.fileno())
        elif each.is_dir():
            _sync_folder(each)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere folders can't be opened
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:  # some file systems know no such thing
        pass
    finally:
        os.close(number)


def is_vacant(folder: Path) -> bool:
    """Return whether a folder is empty, but for what a killed process left half-written."""
    return not any(not path.name.startswith(PARTIAL) for path in folder.iterdir())


def is_free(path: Path) -> bool:
    """Return whether ``path`` is free: nothing is there, or a vacant folder.

    Raises:
        OSError: nothing can be there: its name is too long, a folder above it is a file.
    """
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    return path.is_dir() and is_vacant(path)


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder; no other process may be writing there."""
    for path in folder.glob(f"{PARTIAL}*"):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or folder, without an error if it can't be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def retire(folder: Path) -> None:
    """Rename a folder to a name that nothing reads, then remove it: a kill leaves no half of it behind."""
    if folder.is_dir():
        gone = folder.parent / partial_name()
        os.replace(folder, gone)
        remove(gone)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a temporary folder that is removed after the block, also if a signal ends it."""
    with cleaned_up(), tempfile.TemporaryDirectory(prefix="hf_glu-") as scratch:
        yield Path(scratch)


@contextmanager
def whole_folder(target: Path, *, replacing: bool = False) -> Iterator[Path]:
    """Yield a folder beside ``target`` that is renamed to it at the end of the block, or vanishes.

    Args:
        target: not there yet, or an empty folder.
        replacing: whether what is there makes way.

    Raises:
        OSError: it can't be written, or ``target`` is there and isn't an empty folder.
    """
    stage = target.parent / partial_name()
    with cleaned_up():
        try:
            stage.mkdir(parents=True)
            yield stage
            sync(stage)
            check_stop()
            if replacing:
                retire(target)
            elif os.name != "posix" and target.is_dir():
                target.rmdir()
            os.replace(stage, target)  # an empty folder makes way
        finally:
            remove(stage)
        _sync_folder(target.parent)
