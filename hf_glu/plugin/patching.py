"""Reversible changes of other people's objects, and checks that what is changed is there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from hf_glu.errors import IncompatibleTransformersError

_ABSENT = object()


class Patches:
    """Changes that `undo` takes back, last first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._changed: set[tuple[Any, str]] = set()

    def has(self, owner: Any, name: str) -> bool:
        """Return whether ``owner.name`` has been set."""
        return (owner, name) in self._changed

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of ``owner``, remembering what its own ``__dict__`` held."""
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        self._changed.add((owner, name))

        def undo() -> None:
            if vars(owner).get(name) is not value:
                return  # someone has wrapped ours: theirs stays, and ours passes through
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(undo)

    def on_undo(self, action: Callable[[], None]) -> None:
        """Run ``action`` at undo."""
        self._undo.append(action)

    def undo(self) -> None:
        """Take every change back."""
        while self._undo:
            self._undo.pop()()
        self._changed.clear()


def require(owner: Any, name: str, *parameters: str) -> Any:
    """Return ``owner.name`` after checking that it exists and takes ``parameters``.

    Raises:
        IncompatibleTransformersError: it doesn't.
    """
    import transformers

    where = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
    hint = f"hf_glu needs {where} of Transformers 5; transformers {transformers.__version__}"
    found = getattr(owner, name, None)
    if found is None:
        raise IncompatibleTransformersError(f"{hint} has none: install a version that pyproject.toml names")
    have = inspect.signature(found).parameters if parameters else {}
    if missing := [parameter for parameter in parameters if parameter not in have]:
        raise IncompatibleTransformersError(
            f"{hint} has one without {', '.join(missing)}: install a version that pyproject.toml names"
        )
    return found
