"""The recurrence by operations that every exporter follows, whatever the number of tokens: no loop over them.

After k doublings each token has the sum over the 2^k tokens up to it (Hillis and Steele 1986, "Data Parallel
Algorithms"):

    x_t <- x_t + r_t x_(t - 2^k),   r_t <- r_t r_(t - 2^k)

so that ceil(log2 T) of them are enough: the graph has as many as its longest text needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional

from hf_glu.compat.of_torch import CHECK

LONGEST: ContextVar[int] = ContextVar("LONGEST", default=2**12)


@contextmanager
def at_most(tokens: int) -> Iterator[None]:
    """Let graphs that are traced in the block take texts of up to ``tokens`` tokens."""
    token = LONGEST.set(tokens)
    try:
        yield
    finally:
        LONGEST.reset(token)


def traced(
    gate: Tensor, alpha: Tensor, beta: Tensor, decay: Tensor, start: Tensor | None, valid: Tensor | None,
    restart: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return z and the states, both ``[B, T, W]``, as `scan.stateful` does; ``restart`` as its operator has it.

    Shapes as there. At a restart in reverse, it is the step itself that reads a state of 0.
    """
    if reverse:
        valid, restart = (None if part is None else part.flip(1) for part in (valid, restart))
        z, states = traced(gate.flip(1), alpha, beta, decay, start, valid, restart, False)
        return z.flip(1), states.flip(1)
    dtype = torch.promote_types(gate.dtype, torch.float32)
    wide, alpha, beta, decay = (part.to(dtype) for part in (gate, alpha, beta, decay))
    ones = wide.new_ones(1, 1, 1)
    counted, kept = (ones if part is None else part.unsqueeze(-1).to(dtype) for part in (valid, _not(restart)))
    openness = wide.sigmoid()
    first = wide.new_zeros(wide.shape[0], wide.shape[2]) if start is None else start.to(dtype)
    rates = (kept * (counted * decay + (1 - counted))).expand_as(wide)
    states = doubled((1 - decay) * counted * openness, rates, first)
    before = kept * torch.cat([first.unsqueeze(1), states], dim=1)[:, :-1]
    z = wide + alpha * before + beta * (openness - before)
    return z.to(gate.dtype), states


def _not(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else ~mask


def doubled(x: Tensor, rates: Tensor, first: Tensor) -> Tensor:
    """Return s with s_t = x_t + r_t s_(t-1), all ``[B, T, W]``, from s_(-1) = ``first`` ``[B, W]``."""
    tokens = x.shape[1]
    if not isinstance(tokens, int):
        CHECK.find()(tokens <= LONGEST.get())
    longest = tokens if isinstance(tokens, int) else LONGEST.get()
    x = torch.cat([first.unsqueeze(1), x], dim=1)
    rates = functional.pad(rates, (0, 0, 1, 0))
    for shift in (2**k for k in range(longest.bit_length())):
        x, rates = x + rates * _later(x, shift), rates * _later(rates, shift)
    return x[:, 1:]


def _later(x: Tensor, shift: int) -> Tensor:
    """Return ``x`` ``[B, T, W]`` so many tokens later, 0 before."""
    return functional.pad(x, (0, 0, shift, 0))[:, : x.shape[1]]
