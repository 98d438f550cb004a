"""Options of modulated activations, as ``config.hf_glu["context"]`` has them."""

from __future__ import annotations

from dataclasses import dataclass

from hf_glu.config.section import MAX_LAYERS, Entry, decay_range, is_count
from hf_glu.errors import OptionError, shown

POOLS = ("mean", "running", "encoder")
MAX_SIZE = 2**12


@dataclass(frozen=True, kw_only=True)
class ContextOptions(Entry):
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

    key = "context"
    example = {"layer": 1}  # noqa: RUF012 (of the class)

    size: int = 8
    layer: int = 0
    pool: str | None = None
    decay: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        if not is_count(self.size, MAX_SIZE):
            raise OptionError(f"context size must be at least 1 and at most {MAX_SIZE}, got {shown(self.size)}")
        if not is_count(self.layer, MAX_LAYERS, 0):
            raise OptionError(f"context layer must be the number of a block, got {shown(self.layer)}")
        if self.pool is not None and self.pool not in POOLS:
            raise OptionError(f"context pool must be one of {', '.join(POOLS)}, got {shown(self.pool)}")
        object.__setattr__(self, "decay", decay_range(self.decay, "context", [0.9, 0.99]))
