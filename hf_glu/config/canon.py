"""Options of ``canon_`` activations, as ``config.hf_glu["canon"]`` has them."""

from __future__ import annotations

from dataclasses import dataclass

from hf_glu.config.section import Entry, check_direction, is_count
from hf_glu.errors import OptionError, shown

MAX_KERNEL = 64


@dataclass(frozen=True, kw_only=True)
class CanonOptions(Entry):
    """How far a gate's convolution sees.

    Attributes:
        kernel: k, the tokens that it sees, with the present one.
        direction: ``forward`` (causal), or ``both`` for encoders: the mean of the tokens before and after.

    Raises:
        OptionError: a value out of range.
    """

    key = "canon"
    example = {"kernel": 4}  # noqa: RUF012 (of the class)

    kernel: int = 4
    direction: str = "forward"

    def __post_init__(self) -> None:
        if not is_count(self.kernel, MAX_KERNEL, 2):
            raise OptionError(f"canon kernel must be at least 2 and at most {MAX_KERNEL}, got {shown(self.kernel)}")
        check_direction(self.direction, "canon")
