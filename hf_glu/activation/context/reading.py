"""What a stack's inputs say about its tokens.

Shapes: B sequences, T tokens of this call, K keys (with those of earlier calls).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass
class Reading:
    """The tokens of one forward pass.

    Attributes:
        batch, length: B and T.
        valid: ``[B, T]``, False at padding; None: all count.
        restart: ``[B, T]``, True where another text begins (packed sequences); None: nowhere but at the start.
        vector: ``[B, T or 1, R]``, the context vector of modulated activations; None: there is none (yet).
        rows: ``[N]``, which of the B T tokens a reader inside an expert is given, in their order; None: all.
        labelled: ``[B, T]``, False where only the model around the stack is told of padding. Observers leave it
            out; what the model computes doesn't depend on it. None: they tell nothing.
    """

    batch: int
    length: int
    valid: Tensor | None = None
    restart: Tensor | None = None
    vector: Tensor | None = None
    rows: Tensor | None = None
    labelled: Tensor | None = None

    def padded(self, length: int, device: torch.device) -> Reading:
        """Return the reading of the same tokens with padding after them, ``length`` in all."""
        if (more := length - self.length) <= 0:
            return self
        every = torch.ones(self.batch, self.length, dtype=torch.bool, device=device)
        valid = every if self.valid is None else self.valid
        restart = None if self.restart is None else functional.pad(self.restart, (0, more))
        return replace(self, length=length, valid=functional.pad(valid, (0, more)), restart=restart)

    def vectors(self) -> Tensor | None:
        """Return the context vector of each token that a reader is given, ``[B T or N, R]``."""
        if self.vector is None:
            return None
        found = self.vector if self.length == 1 else self.vector.expand(self.batch, self.length, -1)
        return found.flatten(0, 1) if self.rows is None else found.flatten(0, 1)[self.rows]


def read(inputs: Mapping[str, Any], seen: Callable[[], int | None]) -> Reading | None:
    """Return what the arguments of a stack's forward say; None where there are no tokens in them.

    Args:
        inputs: by name.
        seen: returns how many tokens came before this call, None where that isn't known.
    """
    given = (inputs.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states"))
    tokens = next((each for each in given if each is not None), None)
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        return None
    batch, length = tokens.shape[:2]
    mask = None if length == 1 and torch.compiler.is_compiling() else inputs.get("attention_mask")
    valid = None if mask is None else read_mask(mask, batch, length, seen())
    if length == 1:  # hardly ever padding, which would take a graph for each place to know where it is compiled
        known = valid is not None and not (valid.is_meta or torch.jit.is_tracing())
        return Reading(batch, length, None if known and bool(valid.all()) else valid)  # type: ignore[union-attr]
    restart = read_restarts(inputs.get("position_ids"), batch, length, valid)
    begins = read_beginnings(mask, length, seen())
    return Reading(batch, length, valid, begins if restart is None else restart if begins is None else restart | begins)


def read_mask(mask: Any, batch: int, length: int, offset: int | None) -> Tensor | None:
    """Return which tokens are no padding: ``[B, T]``.

    Args:
        mask: ``[B, K]``; or ``[B, 1, T or 1, K]``, boolean or additive, where a token is valid if it may see itself; or
            a mapping from kinds of attention to such.
        batch, length: B and T.
        offset: the first token's key; None: the last T keys are the tokens'.
    """
    if isinstance(mask, Mapping):
        found = mask.get("full_attention")
        mask = found if found is not None else next((m for m in mask.values() if m is not None), None)
    if not isinstance(mask, Tensor) or mask.shape[-1] < length:
        return None
    last = mask.shape[-1] - length
    start = last if offset is None else min(offset, last)  # a sliding window keeps the last keys only
    if mask.ndim == 2:
        return mask[:, start : start + length].bool()
    if mask.ndim != 4 or mask.shape[2] not in (1, length):
        return None
    own = mask[:, 0].expand(-1, length, -1).diagonal(start, 1, 2)
    seen = own if own.dtype == torch.bool else own > -1
    return seen.expand(batch, length)


def read_beginnings(mask: Any, length: int, offset: int | None) -> Tensor | None:
    """Return which tokens, the first apart, may see themselves and none before: ``[B, T]``; None: there are none, or
    the mask isn't ``[B, 1, T, K]``."""
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[2] != length or mask.is_meta:
        return None
    seen, last = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > -1, mask.shape[-1] - length
    start = last if offset is None else min(offset, last)
    begins = seen.diagonal(start, 1, 2) & ~seen.tril(start - 1).any(-1)
    return begins if torch.compiler.is_compiling() or begins[:, 1:].any() else None


def read_restarts(positions: Any, batch: int, length: int, valid: Tensor | None) -> Tensor | None:
    """Return where position ids ``[B or 1, T]``, or the first of 4 such, begin anew: ``[B, T]``; None: not known."""
    if isinstance(positions, Tensor) and positions.ndim == 3 and len(positions) == 4:
        positions = positions[0]
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] != length:
        return None
    back = positions[:, 1:] <= positions[:, :-1]
    restart = torch.cat([positions[:, :1] == 0, back], dim=1).expand(batch, length)
    return restart if valid is None else restart & valid
