"""Where a model's context vectors come from: one source in each stack that has modulated activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.models.auto import modeling_auto

from hf_glu.activation.context.hooks import stack_and_blocks
from hf_glu.activation.modulated import ContextSource
from hf_glu.config.context import ContextOptions
from hf_glu.config.state import StateOptions
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.sites import Site

_GENERATORS = frozenset(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES).difference(
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
)


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
        pool = _pool(model, stack, site, options)
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


def check_directions(model: nn.Module, sites: list[Site], options: StateOptions) -> None:
    """Raise OptionError where a state of ``sites`` would look ahead in a stack that must not see later tokens."""
    for site in sites if options.direction == "both" else ():
        stack, _ = stack_and_blocks(model, site.name)
        if _causal(model, stack, site):
            raise OptionError(
                f"{site.name}: a state in both directions would let {type(stack).__name__} see later tokens: use "
                "direction=forward, or layers=encoder where there is one"
            )


def _causal(model: Any, stack: Any, site: Site) -> bool:
    """Tell whether a site is in a stack that must not see later tokens.

    Not every causal attention says so of itself (Bloom's, MPT's, those without softmax): neither does any of a family
    that Transformers has for generation and not for filling masks look ahead.
    """
    config = getattr(stack, "config", model.config)
    generates = getattr(config, "model_type", None) in _GENERATORS and not getattr(config, "is_encoder_decoder", False)
    return (
        site.stack == "decoder"
        or site.kind == "mixer"
        or generates
        or getattr(config, "is_decoder", False)
        or any(getattr(module, "is_causal", False) for module in stack.modules())
    )


def _pool(model: Any, stack: Any, site: Site, options: ContextOptions) -> str:
    """Return how a stack's vector is made."""
    causal = _causal(model, stack, site)
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
