"""Some tokens of each sequence as shorter sequences: what an expert is given of a text.

Shapes: B sequences of T tokens, N of which are given; L: the most that one sequence has of them; W channels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_glu.activation.context.passes import current_pass, within
from hf_glu.activation.context.reading import Reading


def told(rows: Tensor | None) -> AbstractContextManager[None]:
    """Let readers know, in a block, that they get the tokens ``rows`` only; None: nobody knows which."""
    now = current_pass()
    if now is None:
        return nullcontext()
    known = None if rows is None or now.reading is None else replace(now.reading, rows=rows)
    return within(replace(now, reading=known))


@dataclass(frozen=True, kw_only=True)
class Routed:
    """The given tokens, side by side.

    Attributes:
        batch, length: B and L.
        place: ``[N]``, where each is in B x L.
        valid: ``[B, L]``, False at padding and where a sequence has fewer.
        restart: ``[B, L]``, True where another text begins; None: nowhere.
        count: ``[B, T]``, how many of them there are up to each token.
        ended: ``[B, T]``, True where another text has begun since the last of them; None: nowhere.
    """

    batch: int
    length: int
    place: Tensor
    valid: Tensor
    restart: Tensor | None
    count: Tensor
    ended: Tensor | None

    @classmethod
    def of(cls, reading: Reading) -> Routed:
        """Return what ``reading.rows`` are."""
        assert reading.rows is not None
        batch, times, rows = reading.batch, reading.length, reading.rows
        given = torch.zeros(batch * times, dtype=torch.bool, device=rows.device)
        given[rows] = True
        given = given.view(batch, times)
        count = given.cumsum(1)
        length = max(int(count[:, -1].max()), 1)
        place = rows // times * length + count.flatten()[rows] - 1

        def aside(values: Tensor) -> Tensor:
            return values.new_zeros(batch * length).index_copy(0, place, values.flatten()[rows]).view(batch, length)

        valid = aside(given if reading.valid is None else reading.valid)
        if reading.restart is None:
            return cls(
                batch=batch, length=length, place=place, valid=valid, restart=None, count=count, ended=None
            )  # fmt: skip
        text = reading.restart.cumsum(1)
        own = aside(text)
        restart = (own != nn.functional.pad(own, (1, -1))) & valid
        last = torch.where(given, text, 0).cummax(1).values
        return cls(
            batch=batch, length=length, place=place, valid=valid, restart=restart, count=count, ended=last != text
        )  # fmt: skip

    def gather(self, x: Tensor) -> Tensor:
        """Return ``x`` ``[N, W]`` as ``[B, L, W]``, 0 where there is nothing."""
        empty = x.new_zeros(self.batch * self.length, x.shape[1])
        return empty.index_copy(0, self.place, x).view(self.batch, self.length, -1)

    def scatter(self, x: Tensor) -> Tensor:
        """Return ``x`` ``[B, L, W]`` as ``[N, W]``, the inverse of `gather`."""
        return x.flatten(0, 1)[self.place]

    def after_each(self, states: Tensor, start: Tensor | None, newest: int) -> Tensor:
        """Return the states ``[B, L, W]`` as they are after each of the ``newest`` last tokens, given or not."""
        first = torch.zeros_like(states[:, 0]) if start is None else start.to(states.dtype)
        all_states, count = torch.cat([first.unsqueeze(1), states], dim=1), self.count[:, -newest:]
        found = all_states.gather(1, count.unsqueeze(-1).expand(-1, -1, states.shape[2]))
        return found if self.ended is None else found.masked_fill(self.ended[:, -newest:].unsqueeze(-1), 0)
