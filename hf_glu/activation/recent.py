"""Shifts that read the gate at the last few tokens of the text: the base of ``canon_N`` and ``smear_N``.

What a token sees are the valid tokens before it in its own text (`hf_glu.activation.context.line`): padding on either
side is left out, another text begins with nothing, generation keeps the last gates in the cache, and an expert sees the
tokens that were sent to it. In both directions, for encoders, it is the mean of what both sides give.

Shapes: B sequences, T tokens, W channels, R tokens back at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from hf_glu.activation.context.line import Line
from hf_glu.activation.context.routed import Routed
from hf_glu.activation.context.states import ROLLBACK, Trail, load_state, store_states
from hf_glu.activation.wrapped import TextShift
from hf_glu.errors import OptionError

Before: TypeAlias = Callable[[int], Tensor]


class Recent(TextShift):
    """z of g and of the last g's, both ``[..., W]``; g itself until it is `configure`d.

    Attributes:
        reach: R; 0 until then.
        direction: ``forward``, or ``both``.
    """

    reach: int = 0
    direction: str = "forward"

    def mixed(self, now: Tensor, before: Before) -> Tensor:
        """Return z of the gates ``now``, ``[B, T, W]``; ``before(i)`` are those i tokens earlier, i from 1 up to R."""
        raise NotImplementedError

    def at_last(self, now: Tensor, line: Tensor) -> Tensor:
        """Return z of the gates ``now``, ``[B, 1, W]``, the last of a ``line`` ``[B, R + 1, W]``; without gradients."""
        return self.mixed(now, lambda back: line[:, -1 - back : -back])

    def forward(self, gate: Tensor) -> Tensor:
        """Return z.

        Raises:
            OptionError: both directions where tokens are generated one after the other.
        """
        if not self.reach:
            return gate
        if (trail := self.trail()) is not None:
            return self._step(gate, trail)
        reading = self.current()
        if reading is not None and reading.rows is not None:
            routed = Routed.of(reading)
            return routed.scatter(self._walk(routed.gather(gate), routed.valid, routed.restart, routed))
        valid, restart = (reading.valid, reading.restart) if reading is not None else (None, None)
        return self._walk(self.sequences(gate), valid, restart).reshape(gate.shape)

    def _step(self, gate: Tensor, trail: Trail) -> Tensor:
        """Return z of one more token, which goes on from the newest state of ``trail``."""
        state = trail.newest()
        batch, _, size = state.shape
        width = size // self.reach
        now = gate if gate.ndim == 3 else gate.view(batch, 1, width)
        line = torch.cat([state, now.to(state.dtype)], dim=-1)
        trail.add(line[..., width:])
        z = self.at_last(now, line.view(batch, -1, width).to(now.dtype))
        return z if z.ndim == gate.ndim else z.view_as(gate)

    def _walk(self, x: Tensor, valid: Tensor | None, restart: Tensor | None, routed: Routed | None = None) -> Tensor:
        """Return z of ``x``, both ``[B, T, W]``; what later tokens need goes into the cache."""
        cache = self.cache()
        if self.direction == "both":
            if cache is not None:
                raise OptionError(f"{self.slot}: both directions can't generate: use direction=forward")
            return torch.lerp(self._one_way(x, valid, restart), self._other_way(x, valid, restart), 0.5)
        start = load_state(cache, self.slot)
        line = Line.of(x, self.reach, start, valid, restart)
        if cache is not None:
            newest = ROLLBACK + 1
            states = line.after(newest) if routed is None else routed.after_each(line.after(), start, newest)
            store_states(cache, self.slot, states)
        return line.given(self.mixed(line.now, line.before))

    def _one_way(self, x: Tensor, valid: Tensor | None, restart: Tensor | None) -> Tensor:
        line = Line.of(x, self.reach, None, valid, restart)
        return line.given(self.mixed(line.now, line.before))

    def _other_way(self, x: Tensor, valid: Tensor | None, restart: Tensor | None) -> Tensor:
        """Return z with the tokens after each one for those before."""
        if restart is not None:  # a text's last token is the first of it from there
            restart = torch.cat([restart[:, 1:], torch.zeros_like(restart[:, :1])], dim=1).flip(1)
        return self._one_way(x.flip(1), None if valid is None else valid.flip(1), restart).flip(1)
