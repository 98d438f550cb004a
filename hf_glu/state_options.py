"""Options of stateful activations, as ``config.hf_glu["state"]`` has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hf_glu.errors import OptionError, refuse_unknown

DIRECTIONS = ("forward", "both")


@dataclass(frozen=True, kw_only=True)
class StateOptions:
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

    decay: tuple[float, float] = (0.5, 0.99)
    alpha: float = 0.0
    beta: float = 0.0
    learnable: bool = True
    direction: str = "forward"

    def __post_init__(self) -> None:
        decay = tuple(self.decay) if isinstance(self.decay, (list, tuple)) else (self.decay,)
        if len(decay) != 2 or not all(isinstance(d, (int, float)) and 0 < d < 1 for d in decay) or decay[0] > decay[1]:
            raise OptionError(f"state decay must be a range within 0 and 1 such as [0.5, 0.99], got {self.decay!r}")
        object.__setattr__(self, "decay", decay)
        for key in ("alpha", "beta"):
            if not isinstance(getattr(self, key), (int, float)) or not abs(getattr(self, key)) < 1e4:
                raise OptionError(f"state {key} must be a number, got {getattr(self, key)!r}")
        if not isinstance(self.learnable, bool):
            raise OptionError(f"state learnable must be true or false, got {self.learnable!r}")
        if self.direction not in DIRECTIONS:
            raise OptionError(f"state direction must be one of {', '.join(DIRECTIONS)}, got {self.direction!r}")

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any] | None) -> StateOptions:
        """Validate an entry of ``config.hf_glu``; None: the defaults."""
        if entry is None:
            return cls()
        if not isinstance(entry, Mapping):
            raise OptionError(f"config.hf_glu state must be a dict such as {{'direction': 'both'}}, got {entry!r}")
        refuse_unknown(entry, (field.name for field in fields(cls)), "config.hf_glu state")
        return cls(**entry)

    def to_dict(self) -> dict[str, Any]:
        """Return what isn't the default."""
        defaults = {field.name: field.default for field in fields(self)}
        found = {key: value for key, value in asdict(self).items() if value != defaults[key]}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
