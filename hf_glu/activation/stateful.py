"""``stateful_N``: a gate that remembers whether it was open.

    z_t = g_t + alpha s_(t-1) + beta (n_t - s_(t-1)),   s_t = d s_(t-1) + (1 - d) n_t,   n_t = sigmoid(g_t)
    y_t = N(z_t) [* u_t]

per channel: s is a running mean of the gate's openness, alpha > 0 coherence (a gate that was closed tends to stay
closed), beta sensitivity to sudden change. Both are 0 at a conversion, so that nothing changes. Padding leaves the
state alone, another text begins with none, and generation keeps it in the cache (`context`). An expert
remembers the tokens that were sent to it.

Shapes: B sequences, T tokens, W channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_glu.activation.context.routed import Routed
from hf_glu.activation.context.states import ROLLBACK, Trail, load_state, store_states
from hf_glu.activation.kernels.scan import bidirectional, decays, spread_decays, stateful, step
from hf_glu.activation.wrapped import TextShift
from hf_glu.config.state import StateOptions
from hf_glu.errors import OptionError

if TYPE_CHECKING:
    from hf_glu.config.glu import GluConfig

Z = "z = g + alpha s + beta (sigmoid(g) - s)"


class Memory(TextShift):
    """z of g, both ``[..., W]``; g itself until it is `configure`d.

    Attributes:
        alpha, beta: ``[W]``.
        decay: logits of the decays ``[W]``.
    """

    alpha: Tensor
    beta: Tensor
    decay: Tensor
    options: StateOptions | None = None

    def configure(self, options: GluConfig, width: int) -> None:
        """Make the parameters of ``width`` channels."""
        self.options = options.read(StateOptions)
        kind = nn.Parameter if self.options.learnable else nn.Buffer
        self.alpha, self.beta, self.decay = (kind(torch.empty(width)) for _ in range(3))
        if self.decay.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at the options' values."""
        if self.options is None:
            return
        init.constant_(self.alpha, self.options.alpha)
        init.constant_(self.beta, self.options.beta)
        init.copy_(self.decay, spread_decays(self.options.decay, len(self.decay)))

    def neutral(self) -> bool:
        """Return whether z is g."""
        return self.options is None or not (self.alpha.any() or self.beta.any())

    def forward(self, gate: Tensor) -> Tensor:
        """Return z.

        Raises:
            OptionError: a state in both directions where tokens are generated one after the other.
        """
        if self.options is None:
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
        parameters = self.alpha.to(state.dtype), self.beta.to(state.dtype), self.decay.to(state.dtype).sigmoid()
        alike = gate.shape == state.shape
        z, newest = step(gate if alike else gate.view(state.shape), *parameters, state)
        trail.add(newest)
        return z if alike else z.view_as(gate)

    def _walk(self, x: Tensor, valid: Tensor | None, restart: Tensor | None, routed: Routed | None = None) -> Tensor:
        """Return z of ``x``, both ``[B, T, W]``; the states after each token go into the cache."""
        assert self.options is not None
        decay, cache = decays(self.decay), self.cache()
        if self.options.direction == "both":
            if cache is not None:
                raise OptionError(f"{self.slot}: a state in both directions can't generate: use direction=forward")
            return bidirectional(x, self.alpha, self.beta, decay, valid=valid, restart=restart)
        start = load_state(cache, self.slot)
        z, states = stateful(x, self.alpha, self.beta, decay, start=start, valid=valid, restart=restart)
        if cache is not None:
            states = states if routed is None else routed.after_each(states, start, ROLLBACK + 1)
            store_states(cache, self.slot, states)
        return z


def _shifted(g: Tensor, alpha: float, beta: float, state: float) -> Tensor:
    """Return z of gates ``[G]`` that come after a state."""
    a, b, decay = (g.new_tensor([value]) for value in (alpha, beta, 0.5))
    return stateful(g.view(-1, 1, 1), a, b, decay, start=g.new_full((len(g), 1), state))[0].flatten()


# label of a figure -> alpha, beta, s
CASES = {"alpha 2, s = 1": (2.0, 0.0, 1.0), "beta 2, s = 0": (0.0, 2.0, 0.0), "beta 2, s = 1": (0.0, 2.0, 1.0)}


def curves(g: Tensor) -> dict[str, Tensor]:
    """Return z of gates ``[G]`` in some cases, by their labels in a figure."""
    return {label: _shifted(g, *case) for label, case in CASES.items()}
