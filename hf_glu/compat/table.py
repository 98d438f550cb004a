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


def missing_in(error: BaseException | None) -> Private | None:
    """Return the row of the name whose absence an error, or one that it comes from, tells; None where none does."""
    while error is not None:
        if isinstance(error, AttributeError):
            module = getattr(error.obj, "__name__", None)
            if found := [row for row in rows() if (row.module, row.name) == (module, error.name)]:
                return found[0]
        error = error.__cause__ or error.__context__
    return None
