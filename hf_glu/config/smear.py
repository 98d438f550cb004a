"""Options of ``smear_`` activations, as ``config.hf_glu["smear"]`` has them."""

from __future__ import annotations

from dataclasses import dataclass

from hf_glu.config.section import Entry, check_direction, is_number
from hf_glu.errors import OptionError, shown


@dataclass(frozen=True, kw_only=True)
class SmearOptions(Entry):
    """How the other token is mixed in.

    Attributes:
        open: sigmoid(c) at the start, in every channel, within 0 and 1.
        direction: ``forward`` (the one before), or ``both`` for encoders: the mean of the one before and the one after.

    Raises:
        OptionError: a value out of range.
    """

    key = "smear"
    example = {"open": 0.5}  # noqa: RUF012 (of the class)

    open: float = 0.5
    direction: str = "forward"

    def __post_init__(self) -> None:
        if not is_number(self.open) or not 0 < self.open < 1:
            raise OptionError(f"smear open must be within 0 and 1, got {shown(self.open)}")
        check_direction(self.direction, "smear")
