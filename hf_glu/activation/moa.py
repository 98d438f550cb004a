"""``moa_N``: a mix of elementwise activations that each token has of its own (Mixture of Activations, 2605.26647).

    y = sum_k a_k(g) phi_k(g),   a(g) = (1 - t) (m + r(g)) + t e_target
    r(g) = softmax(V g) - 1/K,   or r(g) = V g

m and t are those of `hf_glu.activation.learnable.LearnableMix`; V is 0 at first, so that the mix starts where that of
``learnable_N`` does. V may be of low rank, A B with A 0 and B random.

Shapes: N tokens, W channels, K functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from hf_glu.activation.learnable import LearnableMix

if TYPE_CHECKING:
    from hf_glu.config.glu import GluConfig


class TokenMix(LearnableMix):
    """sum_k a_k(x) phi_k(x). Shapes: input and output ``[..., W]``; a `LearnableMix` until it is `configure`d.

    Attributes:
        choice: V ``[K, W]``, or A ``[K, rank]``.
        features: B ``[rank, W]``; None where V is whole.
    """

    kind = "softmax"

    def _build(self, functions: tuple[str, ...], width: int | None) -> None:
        self.choice: nn.Parameter | None = None
        self.features: nn.Parameter | None = None
        super()._build(functions, width)

    def configure(self, options: GluConfig, width: int) -> None:
        """Take the dictionary and the gate from ``config.hf_glu``."""
        super().configure(options, width)
        mix = options.mix or {}
        self.kind, rank = mix.get("gate") or "softmax", mix.get("rank")
        self.choice = nn.Parameter(torch.empty(len(self.names), width if rank is None else rank))
        self.features = None if rank is None else nn.Parameter(torch.empty(rank, width))
        if self.choice.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at the first function, for every token."""
        super().reset_parameters()
        if self.choice is not None:
            init.zeros_(self.choice)
        if self.features is not None:
            init.normal_(self.features, std=self.features.shape[1] ** -0.5)

    def start_at(self, name: str, function: nn.Module) -> None:
        """Start at ``function``, for every token."""
        super().start_at(name, function)
        if self.choice is not None:
            nn.init.zeros_(self.choice)

    def is_pure(self) -> bool:
        """Return whether the mix is exactly its target, for every token."""
        return super().is_pure() and (bool(self.annealed == 1) or self.choice is None or not self.choice.any())

    def weights(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the coefficients of each channel ``[K, W]`` (or None) and of each row of ``x``: ``[N, K]``."""
        channel, row = super().weights(x)
        if self.choice is None:
            return channel, row
        own = (1 - self.annealed) * self.adapted(x)
        return channel, own if row is None else row + own

    def adapted(self, x: Tensor) -> Tensor:
        """Return r ``[N, K]`` for ``x`` ``[N, W]``."""
        assert self.choice is not None
        seen = x if self.features is None else functional.linear(x, self.features.to(x.dtype))
        scores = functional.linear(seen, self.choice.to(seen.dtype)).to(torch.promote_types(x.dtype, torch.float32))
        return scores if self.kind == "linear" else scores.softmax(-1) - 1 / len(self.names)

    def extra_repr(self) -> str:
        """Show the name, the dictionary and the gate in the model's printout."""
        rank = "" if self.features is None else f", rank={len(self.features)}"
        return f"{super().extra_repr()}, gate={self.kind}{rank}"
