"""Giving an object of somebody else's class more to do, in place: its class becomes a subclass of its own.

So it stays what it is to whoever asks for its class, its attributes or the names of its parameters.
"""

from __future__ import annotations

from typing import Any


class InPlace:
    """Base of the mixins of such subclasses: they are pickled by the mixin and the stock class, which have names."""

    def __reduce__(self) -> Any:
        """Pickle."""
        return _rebuild, type(self).__bases__, self.__dict__


def become(item: Any, mixin: type[InPlace]) -> None:
    """Make the class of ``item`` a subclass of ``mixin`` and of what it is now; does nothing the second time."""
    if not isinstance(item, mixin):
        item.__class__ = _joined(mixin, type(item))


def stock_class(item: Any, mixin: type[InPlace] = InPlace) -> type:
    """Return the class that ``item`` had before it became any ``mixin``; its class where it is none."""
    kind = type(item)
    while issubclass(kind, mixin):
        kind = kind.__bases__[1]
    return kind


def become_stock(item: Any, mixin: type[InPlace]) -> None:
    """Undo `become`: take ``mixin`` and its attributes from ``item``; what else it became stays."""
    if not isinstance(item, mixin):
        return
    others, kind = [], type(item)
    while issubclass(kind, InPlace):
        outer, kind = kind.__bases__
        others += [] if outer is mixin else [outer]
    for outer in reversed(others):
        kind = _joined(outer, kind)
    item.__class__ = kind
    for name in mixin.__annotations__:
        vars(item).pop(name, None)


_CLASSES: dict[tuple[type, type], type] = {}


def _joined(mixin: type[InPlace], stock: type) -> type:
    key = mixin, stock
    if key not in _CLASSES:
        _CLASSES[key] = type(stock.__name__, key, {"__module__": stock.__module__})
    return _CLASSES[key]


def _rebuild(mixin: type[InPlace], stock: type) -> Any:
    return object.__new__(_joined(mixin, stock))
