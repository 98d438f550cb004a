"""Options of modulated activations, as ``config.hf_glu["context"]`` has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hf_glu.errors import OptionError, refuse_unknown

POOLS = ("mean", "running", "encoder")


@dataclass(frozen=True, kw_only=True)
class ContextOptions:
    """What a context vector is made of.

    Attributes:
        size: its length, which is the rank of what it does to the channels.
        layer: the block of each stack whose input it summarises; blocks before it aren't modulated.
        pool: ``mean`` of all tokens (encoders), ``running`` mean of those up to each (decoders), or ``encoder``: the
            mean of the encoder's output, for a decoder; None: mean or running, by the stack.
        decay: range of the running mean's decays, spread over the vector.

    Raises:
        OptionError: a value out of range.
    """

    size: int = 8
    layer: int = 0
    pool: str | None = None
    decay: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1:
            raise OptionError(f"context size must be at least 1, got {self.size!r}")
        if type(self.layer) is not int or self.layer < 0:
            raise OptionError(f"context layer must be the number of a block, got {self.layer!r}")
        if self.pool is not None and self.pool not in POOLS:
            raise OptionError(f"context pool must be one of {', '.join(POOLS)}, got {self.pool!r}")
        decay = tuple(self.decay) if isinstance(self.decay, (list, tuple)) else (self.decay,)
        if len(decay) != 2 or not all(isinstance(d, (int, float)) and 0 < d < 1 for d in decay) or decay[0] > decay[1]:
            raise OptionError(f"context decay must be a range within 0 and 1 such as [0.9, 0.99], got {self.decay!r}")
        object.__setattr__(self, "decay", decay)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any] | None) -> ContextOptions:
        """Validate an entry of ``config.hf_glu``; None: the defaults."""
        if entry is None:
            return cls()
        if not isinstance(entry, Mapping):
            raise OptionError(f"config.hf_glu context must be a dict such as {{'layer': 1}}, got {entry!r}")
        refuse_unknown(entry, (field.name for field in fields(cls)), "config.hf_glu context")
        return cls(**entry)

    def to_dict(self) -> dict[str, Any]:
        """Return what isn't the default."""
        defaults = {field.name: field.default for field in fields(self)}
        found = {key: value for key, value in asdict(self).items() if value != defaults[key]}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
