"""The valid tokens before each token in its own text: what a convolution over time reads.

Padding is taken out: the tokens of a sequence stand in a line, so that the one before is the last valid one, with those
of earlier calls in front, and what belongs to another text reads as 0.

Shapes: B sequences, T tokens of this call, W channels, R tokens back at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Line:
    """The tokens of each sequence, one after the other.

    Attributes:
        tokens: ``[B, R + T, W]``: the R valid ones before this call (0 where there are fewer), those of this call that
            are valid, and padding.
        reach: R.
        count: ``[B or 1, T]``, how many are valid up to each token of this call.
        place: ``[B, T]``, where each token of this call stands among the T; None: as they were given.
        text: ``[B, R + T]``, the number of each one's text; None: all are of one.
        own: ``[B, T]``, the number of each token's text in the order in which they were given; None likewise.
    """

    tokens: Tensor
    reach: int
    count: Tensor
    place: Tensor | None
    text: Tensor | None
    own: Tensor | None

    @classmethod
    def of(
        cls, x: Tensor, reach: int, start: Tensor | None = None, valid: Tensor | None = None,
        restart: Tensor | None = None,
    ) -> Line:  # fmt: skip
        """Return the line of the tokens ``x`` ``[B, T, W]``.

        Args:
            x: of this call.
            reach: R.
            start: the last R valid tokens before them, the newest last, ``[B, R W]``; None: there are none.
            valid: bool ``[B, T]``, False at padding; None: all True.
            restart: bool ``[B, T]``, True where another text begins; None: all False.
        """
        batch, length, width = x.shape
        first = x.new_zeros(batch, reach, width) if start is None else start.view(batch, reach, width).to(x.dtype)
        own = None if restart is None else restart.cumsum(1)
        text, place = own, None
        count = torch.arange(1, length + 1, device=x.device).unsqueeze(0)
        if valid is not None:
            steps, count = count.expand(batch, -1) - 1, valid.cumsum(1)
            place = torch.where(valid, count - 1, count[:, -1:] + steps - count)
            order = place.scatter(1, place, steps)  # a permutation: every entry is written
            x = _rows(x, order)
            text = None if text is None else text.gather(1, order)
        if text is not None:
            text = functional.pad(text, (reach, 0))
        tokens = torch.cat([first, x], dim=1)
        return cls(tokens=tokens, reach=reach, count=count, place=place, text=text, own=own)

    @property
    def now(self) -> Tensor:
        """The tokens of this call in the line, ``[B, T, W]``."""
        return self.tokens[:, self.reach :]

    def before(self, back: int) -> Tensor:
        """Return the tokens that stand ``back`` before those of `now`, ``[B, T, W]``, 0 where another text is."""
        begin, length = self.reach - back, self.tokens.shape[1] - self.reach
        found = self.tokens[:, begin : begin + length]
        if self.text is None:
            return found
        other = self.text[:, begin : begin + length] != self.text[:, self.reach :]
        return found.masked_fill(other.unsqueeze(-1), 0)

    def given(self, z: Tensor) -> Tensor:
        """Return ``z`` ``[B, T, W]``, of tokens in the line, in the order in which they were given."""
        return z if self.place is None else _rows(z, self.place)

    def after(self, newest: int | None = None) -> Tensor:
        """Return what the next token would read after each of the ``newest`` last ones, ``[B, newest, R W]``.

        Args:
            newest: of the tokens as they were given; None: all.
        """
        since = 0 if newest is None else -newest
        count, (batch, _, width) = self.count[:, since:].expand(len(self.tokens), -1), self.tokens.shape
        index = (count.unsqueeze(-1) + torch.arange(self.reach, device=count.device)).flatten(1)
        found = _rows(self.tokens, index)
        if self.text is not None and self.own is not None:
            other = self.text.gather(1, index) != self.own[:, since:].repeat_interleave(self.reach, dim=1)
            found = found.masked_fill(other.unsqueeze(-1), 0)
        return found.view(batch, -1, self.reach * width)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows ``index`` ``[B, N]`` of ``x`` ``[B, T, W]``: ``[B, N, W]``."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
