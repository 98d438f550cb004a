"""Options of stateful activations, as ``config.hf_glu["state"]`` has them."""

from __future__ import annotations

from dataclasses import dataclass

from hf_glu.config.section import Entry, check_direction, decay_range, is_number
from hf_glu.errors import OptionError, shown

LARGEST = 1e4


@dataclass(frozen=True, kw_only=True)
class StateOptions(Entry):
    """How a gate remembers.

    Attributes:
        decay: range of the decays at the start, spread over the channels evenly in log(1 - decay): a state forgets
            half of what it saw after log(0.5) / log(decay) tokens, 1 for 0.5 and 69 for 0.99.
        alpha: coherence at the start, in every channel; 0 leaves the function as it is.
        beta: sensitivity to change at the start, in every channel.
        learnable: whether alpha, beta and the decays are trained.
        direction: ``forward`` (causal), or ``both`` for encoders: the mean of the states before and after a token.

    Raises:
        OptionError: a value out of range.
    """

    key = "state"
    example = {"direction": "both"}  # noqa: RUF012 (of the class)
    awake = "alpha and beta aren't 0: the state changes the function from the start"

    decay: tuple[float, float] = (0.5, 0.99)
    alpha: float = 0.0
    beta: float = 0.0
    learnable: bool = True
    direction: str = "forward"

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay", decay_range(self.decay, "state", [0.5, 0.99]))
        for key in ("alpha", "beta"):
            if not is_number(getattr(self, key)) or not abs(getattr(self, key)) < LARGEST:
                raise OptionError(f"state {key} must be a number below {LARGEST:g}, got {shown(getattr(self, key))}")
        if not isinstance(self.learnable, bool):
            raise OptionError(f"state learnable must be true or false, got {shown(self.learnable)}")
        check_direction(self.direction, "state")

    @property
    def neutral(self) -> bool:
        """Whether a gate with these options is at first what it is without a state."""
        return self.alpha == 0 and self.beta == 0
