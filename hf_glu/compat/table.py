"""All that hf_glu uses without promise: what ``hf-glu doctor`` lists."""

from __future__ import annotations

from collections.abc import Iterator

from hf_glu.compat import of_models, of_others, of_torch
from hf_glu.compat.private import Private


def rows() -> tuple[Private, ...]:
    """Return every name, torch's first."""
    return tuple(dict.fromkeys(row for module in (of_torch, of_models, of_others) for row in _in(vars(module))))


def _in(names: dict[str, object]) -> Iterator[Private]:
    for value in names.values():
        if isinstance(value, Private):
            yield value
        elif isinstance(value, tuple):
            yield from (each for each in value if isinstance(each, Private))
