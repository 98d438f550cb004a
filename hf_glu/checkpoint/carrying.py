"""Filters for what is copied from one checkpoint to another, or published: no code, no path of this machine.

Code that came with a checkpoint was written for that one, by somebody else; it neither runs nor goes on from here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PureWindowsPath
from typing import Any

from hf_glu.errors import CheckpointError, DataError

CODE = (
    ".py",
    ".pyc",
    ".pyo",
    ".pyd",
    ".pyw",
    ".pyz",
    ".so",
    ".dll",
    ".dylib",
    ".sh",
    ".bat",
    ".cmd",
    ".ps1",
    ".exe",
    ".whl",
    ".ipynb",
)
# the entries of configs by which libraries find code to execute
REFERENCES = ("auto_map", "custom_pipelines")
DEEPEST = 100  # levels of what we write
_PATH_KEY = re.compile(r"(?:^|_)(?:path|file|dir|folder|checkpoint)s?$")
_PART = r"[^/\\\s\"'`<>|,;:()\[\]{}]+"
_PATH = re.compile(
    rf"(?<![\w./\\~>*-])(?:(?:file://)?(?:~[\w.-]*(?:/{_PART})+|(?:/{_PART}){{2,}})/?|"
    rf"(?:[A-Za-z]:|\\\\{_PART})(?:[\\/]+{_PART})+[\\/]?)"
)
_WHOLE_PATH = re.compile(r"(?:file:/*)?(?:/|(?:~[\w.-]*|[A-Za-z]:)[/\\]|\\\\)[/\\]*[^/\\\s][^\n]*")


def is_code(name: str) -> bool:
    """Return whether a file is code, by its name."""
    return name.lower().endswith(CODE)


def check_inside(path: Path, folder: Path) -> None:
    """Raise CheckpointError unless ``path`` is a file or folder inside of ``folder``: no link out of it, no device.

    The Hub's cache is inside: each snapshot links into the ``blobs`` of its repository.
    """
    home, found = folder.resolve(), path.resolve()
    store = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    inside = any(root in found.parents for root in (home, store))
    if path.is_symlink() and (not inside or found in path.parent.resolve().parents or found.is_dir()):
        raise CheckpointError(f"{path} is a link to {found}: put a copy of what it means there, or remove it")
    if not (found.is_file() or found.is_dir()):
        raise CheckpointError(f"{path} is neither a file nor a folder: remove it")


def without_code(data: object) -> Any:
    """Return JSON data without the entries by which libraries find code to run (`REFERENCES`), at any depth."""
    if isinstance(data, dict):
        return {key: without_code(value) for key, value in data.items() if not _is_reference(key, value)}
    return [without_code(value) for value in data] if isinstance(data, list) else data


def _is_reference(key: object, value: object) -> bool:
    return key in REFERENCES and isinstance(value, (dict, list, str))  # in a vocabulary it is a word, with its number


def references(data: object) -> list[str]:
    """Return the names of the entries that `without_code` removes, each once."""
    if isinstance(data, list):
        return list(dict.fromkeys(name for value in data for name in references(value)))
    if not isinstance(data, dict):
        return []
    found = [[key] if _is_reference(key, value) else references(value) for key, value in data.items()]
    return list(dict.fromkeys(name for names in found for name in names))


def without_paths(data: object, depth: int = 0) -> Any:
    """Return JSON data in which each absolute path, of any system, is cut to its last name.

    Raises:
        DataError: they are nested too deeply.
    """
    if depth > DEEPEST:
        raise DataError(f"values nested more than {DEEPEST} deep are nothing that hf_glu writes")
    if isinstance(data, dict):
        return {without_paths(key): without_paths(value, depth + 1) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [without_paths(value, depth + 1) for value in data]
    if not isinstance(data, str):
        return data
    if _WHOLE_PATH.fullmatch(data):
        return PureWindowsPath(data).name
    return _PATH.sub(lambda found: PureWindowsPath(found[0]).name, data)


def clean_json(source: Path, target: Path, *, ours: bool = False) -> list[str]:
    """Copy a JSON file without references to code and local paths; return the references' names.

    Bytes stay as they are where there is nothing to take out, or nothing that can be read.

    Args:
        source, target: the files.
        ours: whether hf_glu writes such files: all texts are looked at, else those that are called a path.

    Raises:
        CheckpointError: it is nested too deeply.
    """
    content = source.read_bytes()
    try:
        data = json.loads(content.decode("utf-8"))
        cleaned = without_code(data)
        cleaned = without_paths(cleaned) if ours else _without_named_paths(cleaned)
        found = references(data)
        if cleaned != data:
            content = (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
    except ValueError:  # no library reads it either
        target.write_bytes(content)
        return []
    except RecursionError:
        raise CheckpointError(f"{source} is nested too deeply to be looked through: remove it") from None
    target.write_bytes(content)
    return found


def _without_named_paths(data: object, key: str = "") -> Any:
    if isinstance(data, dict):
        return {key: _without_named_paths(value, key) for key, value in data.items()}
    if isinstance(data, list):
        return [_without_named_paths(value, key) for value in data]
    if isinstance(data, str) and _PATH_KEY.search(key) and _WHOLE_PATH.fullmatch(data):
        return PureWindowsPath(data).name
    return data
