"""Filling the dataclasses of options from one flat mapping, as a YAML file and flags give it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.checkpoint.writing import reason_of, user_path
from hf_glu.errors import OptionError, UnknownNameError, nearest, shown
from hf_glu.training.options import ModelOptions, TrainingOptions

Kind = TypeVar("Kind", bound=ModelOptions)
Training = TypeVar("Training", bound=TrainingOptions)


def split_options(values: Mapping[str, object], kind: type[Kind], training: type[Training]) -> tuple[Kind, Training]:
    """Make both dataclasses from one flat mapping, as a YAML file and flags give it.

    Args:
        values: option -> value.
        kind: which options of a job there are.
        training: which options of a training.

    Raises:
        UnknownNameError: a key that neither has.
        OptionError: a value of the wrong type, or out of range.
    """
    parts: list[JsonObject] = [{}, {}]
    known = [{each.name: each for each in dataclasses.fields(one)} for one in (kind, training)]
    for key, value in values.items():
        owner = next((number for number, names in enumerate(known) if key in names), None)
        if owner is None:
            raise UnknownNameError(f"unknown option {shown(key)}; {nearest(key, [*known[0], *known[1]])}")
        parts[owner][key] = _typed(key, value, str(known[owner][key].type))
    return kind(**parts[0]), training(**parts[1])


def _typed(key: str, value: object, kind: str) -> Any:
    """Convert ``value`` to a field's type: YAML reads 2e-5 as a string and 1024 as a number."""
    name, optional = kind.removesuffix(" | None"), kind.endswith("| None")
    if value is None and optional:
        return None
    if name == "list[str]":
        return [_typed(key, each, "str") for each in (value if isinstance(value, list) else [value])]
    wanted = {"int": int, "float": float, "str": str, "bool": bool}[name]
    allowed = {"int": int, "float": (int, float, str), "str": (str, int, float), "bool": bool}[name]
    if not isinstance(value, allowed) or (isinstance(value, bool) and name != "bool"):  # type: ignore[arg-type]
        raise OptionError(f"{key} must be {name}, got {shown(value)}")
    try:
        return wanted(value)
    except (ValueError, OverflowError):
        raise OptionError(f"{key} must be {name}, got {shown(value)}") from None


def read_yaml(path: Path) -> JsonObject:
    """Read options from a YAML file.

    Raises:
        OptionError: no such file, or no mapping in it.
    """
    import yaml

    try:
        values = yaml.safe_load(user_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{path} can't be read: {reason_of(error)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bytes that are no text, a 13th month
        raise OptionError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise OptionError(f"{path} must map options to values, such as `lr: 2e-5`")
    return values
