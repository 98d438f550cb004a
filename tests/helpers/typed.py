"""Plain data beside the typed dictionary that says what they are."""

from __future__ import annotations

import types
from typing import Any, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

SIMPLE = (str, bool, int, float, type(None))


def required(kind: Any) -> set[str]:
    """Return the keys that a typed dictionary must have; its own set knows no annotations that are strings."""
    hints = get_type_hints(kind, include_extras=True)
    return {key for key in kind.__required_keys__ if get_origin(hints[key]) is not NotRequired}


def untyped(value: Any, kind: Any, path: str = "") -> list[str]:
    """Return the places of ``value`` that aren't of the type ``kind``: keys that lack or are too many, other types."""
    if kind is Any or kind is object:
        return []
    if is_typeddict(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, dict):
            return [f"{path}: no dictionary"]
        wrong = [f"{path}/{key}: missing" for key in sorted(required(kind) - value.keys())]
        wrong += [f"{path}/{key}: unknown" for key in sorted(value.keys() - hints.keys())]
        return wrong + [
            each for key in value.keys() & hints.keys() for each in untyped(value[key], hints[key], f"{path}/{key}")
        ]
    if get_origin(kind) in (Union, types.UnionType):
        tried = [untyped(value, each, path) for each in get_args(kind)]
        return [] if [] in tried else max(tried, key=lambda found: max(each.count("/") for each in found))
    if get_origin(kind) is list:
        if not isinstance(value, list):
            return [f"{path}: no list"]
        return [
            each for number, item in enumerate(value) for each in untyped(item, get_args(kind)[0], f"{path}/{number}")
        ]
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            return [f"{path}: no dictionary"]
        return [each for key, item in value.items() for each in untyped(item, get_args(kind)[1], f"{path}/{key}")]
    assert kind in SIMPLE, kind
    allowed = (int, float) if kind is float else kind
    fits = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    return [] if fits else [f"{path}: {type(value).__name__}, not {kind.__name__}"]
