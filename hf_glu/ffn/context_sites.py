"""What kinds of activations ask of a model: that they may be where they are, and parts of their own in its layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers.models.auto import modeling_auto

from hf_glu.activation import registry
from hf_glu.activation.context.hooks import stack_and_blocks
from hf_glu.activation.modulated import ContextSource
from hf_glu.config.glu import GluConfig
from hf_glu.config.kinds import Part, Place
from hf_glu.config.registry import KAPPA, hears
from hf_glu.errors import OptionError
from hf_glu.ffn.sites import Site

_GENERATORS = frozenset(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES).difference(
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
)
Flagged = Iterable[tuple[Site, Collection[str]]]  # sites with the flags of what they have, or are to get


def check_kinds(model: nn.Module, flagged: Flagged, options: GluConfig) -> None:
    """Raise OptionError where an activation can't be at its site with these options, such as one that looks ahead."""
    flagged = list(flagged)
    for kind in registry.sections.values():
        assert kind.section is not None
        kind.check(_places(model, flagged, kind.flag), options.read(kind.section))


def check_routed(name: str, site: Site) -> None:
    """Raise OptionError where an activation would hear a router (``kappa_``), and there is none, or it isn't asked."""
    if hears(name) and site.kind == "experts":
        raise OptionError(f"{site.name}: a bank hears its router by experts=, such as experts='{name}*8' for 8 of them")
    if hears(name):
        raise OptionError(
            f"{site.name} has no router for {name} to hear: kappa_ is for experts, give experts=8 beside it, or use "
            f"{name.replace(f'{KAPPA}_', '')}"
        )


def needed_parts(model: nn.Module, flagged: Flagged, options: GluConfig) -> list[Part]:
    """Return what the activations at some sites need in the model beside them.

    Raises:
        OptionError, ConversionError: the model has no place for it.
    """
    flagged = list(flagged)
    found = []
    for kind in registry.sections.values():
        assert kind.section is not None
        found += kind.parts(_places(model, flagged, kind.flag), options.read(kind.section))
    return found


def settle_kinds(model: nn.Module, flagged: Flagged, options: GluConfig) -> None:
    """Check that the activations can be at their sites, and put what they need there into the model.

    Raises:
        OptionError, ConversionError: as of `check_kinds` and `needed_parts`.
    """
    flagged = list(flagged)
    check_kinds(model, flagged, options)
    place_parts(model, flagged, options)


def place_parts(model: nn.Module, flagged: Flagged, options: GluConfig) -> None:
    """Put what the activations at some sites need into the model; does nothing where it is there."""
    for part in needed_parts(model, flagged, options):
        if part.taken:
            continue
        like, made = next(part.block.parameters()), part.make()
        if like.device.type != "meta" and not any(p.device.type == "meta" for p in made.parameters()):
            made = made.to(device=like.device)
        setattr(part.block, part.name, made.to(dtype=like.dtype).train(part.block.training))


def _places(model: Any, flagged: list[tuple[Site, Collection[str]]], flag: str) -> list[Place]:
    """Return the places of the sites that have ``flag``."""
    found = []
    for site, flags in flagged:
        if flag in flags:
            stack, blocks = stack_and_blocks(model, site.name)
            found.append(Place(
                name=site.name, stack=stack, side=site.stack, blocks=blocks, hidden=site.hidden,
                causal=_causal(model, stack, site), encoded=getattr(model.config, "is_encoder_decoder", False),
            ))  # fmt: skip
    return found


def _causal(model: Any, stack: Any, site: Site) -> bool:
    """Return whether a site is in a stack that must not see later tokens.

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


def remove_sources(model: nn.Module) -> None:
    """Take the sources away, where nothing reads their vectors any more."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "context_source", None), ContextSource):
            del module.context_source
