"""What the entries of ``config.hf_glu`` that hold options of their own have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, Self

from hf_glu.errors import LONGEST, OptionError, refuse_unknown, shown

DIRECTIONS = ("forward", "both")  # in which an activation reads the tokens around it
# more than any model has; what goes beyond is a broken file, and must not be allocated
MAX_WIDTH, MAX_EXPERTS, MAX_UNITS, MAX_LAYERS = 2**20, 2**12, 2**26, 2**12


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite number, which neither true nor 10**400 are."""
    try:
        return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:
        return False


def is_count(value: Any, largest: int, smallest: int = 1) -> bool:
    """Return whether ``value`` is an integer in this range, ends included."""
    return type(value) is int and smallest <= value <= largest


def is_name(value: Any) -> bool:
    """Return whether ``value`` can be the name of an activation."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST


class Entry:
    """Base of a frozen dataclass of options, each with a default.

    Attributes:
        key: of the entry.
        example: such an entry, for messages.
        awake: what a plan says where a conversion with such options isn't exact.
    """

    key: ClassVar[str]
    example: ClassVar[dict[str, Any]]
    awake: ClassVar[str] = ""

    @property
    def neutral(self) -> bool:
        """Whether an activation with these options is at first what it is without them."""
        return True

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any] | None) -> Self:
        """Validate an entry of ``config.hf_glu``; None: the defaults."""
        if entry is None:
            return cls()
        if not isinstance(entry, Mapping):
            raise OptionError(f"config.hf_glu {cls.key} must be a dict such as {cls.example}, got {shown(entry)}")
        refuse_unknown(entry, (field.name for field in fields(cls)), f"config.hf_glu {cls.key}")  # type: ignore[arg-type]
        return cls(**entry)

    def to_dict(self) -> dict[str, Any]:
        """Return what isn't the default."""
        defaults = {field.name: field.default for field in fields(self)}  # type: ignore[arg-type]
        found = {key: value for key, value in asdict(self).items() if value != defaults[key]}  # type: ignore[call-overload]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def decay_range(value: Any, key: str, example: list[float]) -> tuple[float, float]:
    """Return a range of decays.

    Raises:
        OptionError: it isn't one within 0 and 1.
    """
    decay = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if len(decay) != 2 or not all(is_number(d) and 0 < d < 1 for d in decay) or decay[0] > decay[1]:
        raise OptionError(f"{key} decay must be a range within 0 and 1 such as {example}, got {shown(value)}")
    return decay


def check_direction(value: Any, key: str) -> None:
    """Raise OptionError unless ``value`` is one of `DIRECTIONS`."""
    if value not in DIRECTIONS:
        raise OptionError(f"{key} direction must be one of {', '.join(DIRECTIONS)}, got {shown(value)}")
