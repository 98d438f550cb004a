"""Where a model's context vectors come from: one source in each stack that has modulated activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_glu.activation.modulated import ContextSource
from hf_glu.context.hooks import stack_and_blocks
from hf_glu.context_options import ContextOptions
from hf_glu.errors import ConversionError, OptionError
from hf_glu.layers.sites import Site


@dataclass(frozen=True, kw_only=True, eq=False)
class SourcePlace:
    """Where a source goes: the block whose input it summarises, and how."""

    block: nn.Module
    hidden: int
    pool: str

    @property
    def taken(self) -> bool:
        """Whether the source is there."""
        return isinstance(getattr(self.block, "context_source", None), ContextSource)

    def parameters(self, options: ContextOptions) -> int:
        """Return the number of parameters that the source would add."""
        return 0 if self.taken else options.size * (self.hidden + (self.pool == "running"))


def source_places(model: nn.Module, sites: list[Site], options: ContextOptions) -> list[SourcePlace]:
    """Return the places of the sources that the modulated activations at ``sites`` need.

    Raises:
        OptionError: a layer that a stack doesn't have, or an encoder's vector for a model without one.
        ConversionError: a model without layers.
    """
    found: dict[int, SourcePlace] = {}
    for site in sites:
        stack, blocks = stack_and_blocks(model, site.name)
        if blocks is None:
            raise ConversionError(f"{site.name} is in no list of layers: there is no place for a context vector")
        if options.layer >= len(blocks):
            raise OptionError(f"context layer {options.layer} is out of range: the stack has {len(blocks)} layers")
        block = blocks[options.layer]
        pool = _pool(model, stack, block, site, options)
        found.setdefault(id(block), SourcePlace(block=block, hidden=site.hidden, pool=pool))
    return list(found.values())


def place_sources(model: nn.Module, sites: list[Site], options: ContextOptions) -> None:
    """Put the sources in their places; does nothing where they are."""
    for place in source_places(model, sites, options):
        if place.taken:
            continue
        like = next(place.block.parameters())
        source = ContextSource(place.hidden, options, place.pool)
        if like.device.type != "meta" and source.weight.device.type != "meta":
            source = source.to(device=like.device)
        place.block.context_source = source.to(dtype=like.dtype).train(place.block.training)


def _pool(model: Any, stack: Any, block: nn.Module, site: Site, options: ContextOptions) -> str:
    """Return how a stack's vector is made: causal stacks must not see later tokens."""
    config = getattr(stack, "config", model.config)
    causal = site.stack == "decoder" or (
        site.stack is None
        and (
            site.kind == "mixer"
            or getattr(config, "is_decoder", False)
            or any(getattr(module, "is_causal", False) for module in block.modules())
        )
    )
    if options.pool == "encoder" and causal:
        if site.stack != "decoder" or not getattr(model.config, "is_encoder_decoder", False):
            raise OptionError(f"context pool=encoder needs a decoder with an encoder, not {type(stack).__name__}")
        return "encoder"
    if options.pool == "mean" and causal:
        raise OptionError(f"context pool=mean would let {type(stack).__name__} see later tokens: use running")
    return "running" if causal or options.pool == "running" else "mean"


def remove_sources(model: nn.Module) -> None:
    """Take the sources away, where nothing reads their vectors any more."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "context_source", None), ContextSource):
            del module.context_source
