"""``modulated_N``: a gate whose threshold and slope depend on what the model has read.

    y = N(slope (g - threshold)) [* u],   threshold = T c,   slope = 1 + S c

c is a context vector of the whole text, one for all layers (`ContextSource`); T and S are of each layer, of low rank,
and 0 at a conversion, so that nothing changes (cf. Neuromodulation Gated Transformer, https://arxiv.org/abs/2305.03232).

Shapes: B sequences, T tokens, H hidden size, W channels, R size of the context vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from hf_glu.activation.context import Reader
from hf_glu.activation.context.hooks import SOURCE
from hf_glu.activation.context.reading import read_mask
from hf_glu.activation.context.states import load_state, store_states
from hf_glu.activation.kernels.modulation import fused_modulation, modulate, recomputed_modulation
from hf_glu.activation.kernels.scan import decays, spread_decays, stateful
from hf_glu.activation.module import OwnedModule
from hf_glu.activation.wrapped import TextShift
from hf_glu.config.context import ContextOptions
from hf_glu.config.kinds import Part, Place
from hf_glu.errors import ConversionError, OptionError

if TYPE_CHECKING:
    from hf_glu.config.glu import GluConfig

PAPER = "hf_glu; cf. NGT, https://arxiv.org/abs/2305.03232"
EQUATION = "slope (g - threshold)"


class Modulation(TextShift):
    """slope (g - threshold), both ``[..., W]``; g itself where there is no context vector.

    Attributes:
        threshold, slope: T and S, ``[W, R]``.
    """

    options: ContextOptions | None = None

    def configure(self, options: GluConfig, width: int) -> None:
        """Make the parameters of ``width`` channels."""
        self.options = options.read(ContextOptions)
        self.threshold, self.slope = (nn.Parameter(torch.empty(width, self.options.size)) for _ in range(2))
        if self.threshold.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Without effect at first."""
        for parameter in self.parameters():
            init.zeros_(parameter)

    def forward(self, gate: Tensor) -> Tensor:
        """Return the modulated gate."""
        if self.options is None:
            return gate
        rows = self._vectors(gate)
        if rows is None:
            return _with_no_gradient(gate, self.threshold, self.slope)
        shift = recomputed_modulation if self.saves_memory else modulate
        return shift(gate.reshape(-1, gate.shape[-1]), rows, self.threshold, self.slope).reshape(gate.shape)

    def then(self, phi: nn.Module, gate: Tensor) -> Tensor | None:
        """Return phi of the modulated gate in one pass; None where there is no context vector."""
        rows = None if self.options is None else self._vectors(gate)
        if rows is None:
            return None
        return fused_modulation(phi, gate.reshape(-1, gate.shape[-1]), rows, self.threshold, self.slope).view(
            gate.shape
        )

    def _vectors(self, gate: Tensor) -> Tensor | None:
        """Return c of each row of ``gate``, ``[N, R]``; None in a layer before the one that makes the vector."""
        reading = self.current()
        if reading is None or reading.vector is None:
            return None
        if reading.rows is None and gate.shape[:-1] != (reading.batch, reading.length):
            self.sequences(gate)
        rows = reading.vectors()
        assert rows is not None
        return rows.to(gate.dtype)

    def neutral(self) -> bool:
        """Return whether it does nothing."""
        return self.options is None or not (self.threshold.any() or self.slope.any())


def _with_no_gradient(x: Tensor, *parameters: Tensor) -> Tensor:
    """Return ``x``; the parameters get gradients of 0, which those who train in several processes wait for."""
    if not torch.is_grad_enabled():
        return x
    return x + sum((parameter.sum() * 0 for parameter in parameters), x.new_zeros(())).to(x.dtype)


class ContextSource(Reader, OwnedModule):
    """c: a mean over tokens of sigmoid(P h), h being what the block is given.

    Of all valid tokens (``mean``: ``[B, 1, R]``), of those up to each with exponentially falling weights (``running``:
    ``[B, T, R]``, kept in the cache), or of the encoder's output (``encoder``: ``[B, 1, R]``).

    Args:
        hidden: H.
        options: of the context vector.
        pool: which of the three.
    """

    def __init__(self, hidden: int, options: ContextOptions, pool: str) -> None:
        super().__init__()
        self.options, self.pool = options, pool
        self.weight = nn.Parameter(torch.empty(options.size, hidden))
        self.decay = nn.Parameter(torch.empty(options.size)) if pool == "running" else None
        if self.weight.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random directions; decays within the options' range."""
        init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        if self.decay is not None:
            init.copy_(self.decay, spread_decays(self.options.decay, len(self.decay)))

    def forward(
        self, hidden: Tensor, encoder_hidden: Tensor | None = None, encoder_mask: Tensor | None = None
    ) -> Tensor:
        """Return c of what a block is given, ``[B, T, H]``."""
        reading, cache = self.current(), self.cache()
        valid = None if reading is None else reading.valid
        if self.pool == "encoder":
            if encoder_hidden is None:
                raise OptionError("context pool=encoder needs an encoder's output, and the layer is given none")
            hidden, valid = (
                encoder_hidden,
                None if encoder_mask is None else _encoder_mask(encoder_mask, encoder_hidden),
            )
        features = functional.linear(hidden, self.weight.to(hidden.dtype))
        if self.decay is None:
            return _mean(features.sigmoid(), valid, None if reading is None or self.pool != "mean" else reading.restart)
        none = torch.zeros_like(self.decay)
        restart = None if reading is None else reading.restart
        start = load_state(cache, self.slot)
        _, states = stateful(features, none, none, decays(self.decay), start=start, valid=valid, restart=restart)
        if cache is not None:
            store_states(cache, self.slot, states)
        return states


def _mean(openness: Tensor, valid: Tensor | None, restart: Tensor | None) -> Tensor:
    """Return the mean over the valid tokens of ``[B, T, R]``: ``[B, 1, R]``; of each text, ``[B, T, R]``."""
    counts = torch.ones_like(openness[..., :1]) if valid is None else valid.to(openness.dtype).unsqueeze(-1)
    if restart is None:
        return (openness * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp_min(1)
    texts = restart.cumsum(1).unsqueeze(-1)
    sums, sizes = (torch.zeros(len(x), x.shape[1] + 1, x.shape[2], dtype=x.dtype, device=x.device)
                   .scatter_add(1, texts.expand_as(x), x) for x in (openness * counts, counts))  # fmt: skip
    return (sums / sizes.clamp_min(1)).gather(1, texts.expand_as(openness))


def _encoder_mask(mask: Tensor, hidden: Tensor) -> Tensor | None:
    """Return which of the encoder's tokens count: ``[B, S]``, of a mask ``[B, S]`` or ``[B, 1, 1 or T, S]``."""
    batch, length = hidden.shape[:2]
    if mask.ndim == 4:
        row = mask[:, 0, 0]
        return (row if row.dtype == torch.bool else row > -1).expand(batch, length)
    return read_mask(mask, batch, length, None)


def _moved(g: Tensor, threshold: float, slope: float) -> Tensor:
    """Return what gates ``[G]`` are with a threshold and a slope."""
    shift, steepness = (g.new_tensor([[value]]) for value in (threshold, slope - 1))
    return modulate(g.unsqueeze(1), g.new_ones(len(g), 1), shift, steepness)[:, 0]


# label of a figure -> threshold, slope
CASES = {
    "threshold 1": (1.0, 1.0), "threshold -1": (-1.0, 1.0), "slope 2": (0.0, 2.0), "slope 0.5": (0.0, 0.5),
}  # fmt: skip


def curves(g: Tensor) -> dict[str, Tensor]:
    """Return gates ``[G]`` as they are in some cases, by their labels in a figure."""
    return {label: _moved(g, *case) for label, case in CASES.items()}


def source_parts(places: Sequence[Place], options: ContextOptions) -> list[Part]:
    """Return the sources of context vectors that a model needs: one in each stack that has modulated activations.

    Raises:
        OptionError: a layer that a stack doesn't have, or an encoder's vector for a model without one.
        ConversionError: a model without layers.
    """
    found: dict[int, Part] = {}
    for place in places:
        if place.blocks is None:
            raise ConversionError(f"{place.name} is in no list of layers: there is no place for a context vector")
        if options.layer >= len(place.blocks):
            raise OptionError(
                f"context layer {options.layer} is out of range: the stack has {len(place.blocks)} layers"
            )
        block, pool = place.blocks[options.layer], _pool(place, options)
        found.setdefault(id(block), Part(
            block=block, name=SOURCE, make=partial(ContextSource, place.hidden, options, pool),
            parameters=options.size * (place.hidden + (pool == "running")),
        ))  # fmt: skip
    return list(found.values())


def _pool(place: Place, options: ContextOptions) -> str:
    """Return how a stack's vector is made."""
    if options.pool == "encoder" and place.causal:
        if place.side != "decoder" or not place.encoded:
            raise OptionError(f"context pool=encoder needs a decoder with an encoder, not {type(place.stack).__name__}")
        return "encoder"
    if options.pool == "mean" and place.causal:
        raise OptionError(f"context pool=mean would let {type(place.stack).__name__} see later tokens: use running")
    return "running" if place.causal or options.pool == "running" else "mean"
