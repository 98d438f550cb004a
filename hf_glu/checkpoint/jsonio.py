"""Reading and writing JSON: files are written whole or not at all, and NaN, which is no JSON, becomes null."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeAlias

from hf_glu.checkpoint.writing import reason_of, write_text
from hf_glu.errors import CheckpointError, DataError

# an object of JSON: what is under a key can be anything until somebody has looked
JsonObject: TypeAlias = dict[str, Any]


def to_json(data: object) -> str:
    """Return ``data`` as indented JSON; infinities and NaN become null, characters that UTF-8 lacks are escaped."""
    text = json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate becomes JSON's own escape


def write_json(path: Path, data: object) -> None:
    """Write ``data`` as JSON, whole or not at all.

    Raises:
        CheckpointError: it can't be written.
    """
    write_text(path, to_json(data) + "\n")


def read_text(path: Path) -> str:
    """Return the content of a text file.

    Raises:
        CheckpointError, DataError: it can't be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8") from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {reason_of(error)}") from error


def read_object(path: Path) -> JsonObject:
    """Return the object that a JSON file holds.

    Raises:
        CheckpointError, DataError: it can't be read, or is none.
    """
    return _object(read_text(path), path)


def read_lines(path: Path) -> list[JsonObject]:
    """Return the objects of a JSON Lines file; an incomplete last line is left out.

    Raises:
        CheckpointError, DataError: it can't be read, or a line is none.
    """
    *whole, last = read_text(path).split("\n")
    found = [_object(line, path, number) for number, line in enumerate(whole, 1) if line.strip()]
    try:
        return [*found, _object(last, path, len(whole) + 1)] if last.strip() else found
    except DataError:
        return found


def _object(text: str, path: Path, line: int = 1) -> JsonObject:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {line + error.lineno - 1}: broken JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:  # lists in lists without end, a number of 5,000 digits
        raise DataError(f"{path}, line {line}: JSON that can't be read: {reason_of(error)}") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}, line {line}: an object {{...}} is expected, not {type(data).__name__}")
    return data


def _finite(data: object) -> object:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
