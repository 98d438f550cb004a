"""Turning a freshly built stock model, whose config names a gated activation, into one with gated FFNs.

The stock constructor has put an activation of ours wherever it reads that config field. At each FFN site the
in-projection is widened to ``[gate | up]``; a natively gated site gets the gate's elementwise part; everything else (an
LM head's transform, layers that were not chosen) gets the dense activation.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn

from hf_glu.activation import registry
from hf_glu.activation.context import watch_context
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.activation.module import OwnedActivation, OwnedModule
from hf_glu.config.glu import GluConfig, iso_width
from hf_glu.config.layers import check_layers, highest, selected
from hf_glu.config.registry import GATED
from hf_glu.config.router_fields import add_router_fields
from hf_glu.errors import ConversionError, NoSiteError, OptionError
from hf_glu.ffn.config_fields import activation_of, default_activation, names_ours, write_activation
from hf_glu.ffn.context_sites import check_routed, settle_kinds
from hf_glu.ffn.expert_sites import make_experts, put_experts
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.experts.group import flags_of
from hf_glu.ffn.experts.losses import watch
from hf_glu.ffn.experts.native import MixedBank, mix_bank
from hf_glu.ffn.families import LOOK_UP_IN_FORWARD, NAME_ATTRIBUTES
from hf_glu.ffn.forward import projections
from hf_glu.ffn.identify import governing_configs
from hf_glu.ffn.linear import out_features, resize
from hf_glu.ffn.mixers import own_gate
from hf_glu.ffn.sites import Site, convertible_sites, find_banks, stack_of


def owned_activations(model: nn.Module) -> list[tuple[str, OwnedActivation]]:
    """Return our activations in ``model`` with their names; the parts of one are not listed."""
    found: list[tuple[str, OwnedActivation]] = []
    inner: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, OwnedActivation) and id(module) not in inner:
            found.append((name, module))
            inner |= {id(part) for part in module.modules()}
    return found


def is_ours(model: nn.Module) -> bool:
    """Return whether a model has an activation, experts or a bank of ours."""
    return any(isinstance(module, (OwnedModule, MixedBank)) for module in model.modules())


def build_ffns(model: nn.Module, config: Any) -> list[Site]:
    """Build the FFN sites of ``model`` in place, before its weights are initialised; return those that no plan
    of tensor parallelism may split: widened ones, and those whose activation has parameters of each unit, or reads all.

    Does nothing where neither the config nor the model names an activation of ours, and nothing to sites that have been
    built already. A site follows the config that governs it, which may be one inside of ``config``.

    Raises:
        NoSiteError: the model uses one of our activations but has no FFN site that the table knows.
        OptionError: the options select layers that the model doesn't have.
        ConversionError: the activation can't be the gate of a natively gated family.
    """
    if not names_ours(config) and not owned_activations(model):
        return []
    options = GluConfig.of(config)
    sites, banks = convertible_sites(model), find_banks(model)
    if not sites and not banks and not find_experts(model):
        if not owned_activations(model) and (stack_of(model) or (options.activation or options.experts) is None):
            return []  # a part without FFNs, which was given the whole model's config
        raise NoSiteError(f"{type(model).__name__} has no FFN that hf_glu can gate: `hf-glu sites MODEL` lists them")
    if not find_experts(model):  # else this is the second pass, and the layers that have them are no sites any more
        check_selection([*sites, *banks], options)
    for site in sites:
        _place_activation(model, site)
    dense = options.dense_act or default_activation(config)
    new = [site.in_proj for site in sites if site.kind == "dense" and not site.widened]
    if options.bias and new and all(linear.bias is not None for linear in new):
        options = replace(options, bias=None)  # they have one anyway
        config.hf_glu = options.to_dict()
    sites = sites if banks else build_experts(model, config, sites, options)
    own = [site for site in sites if site.activation and _build_site(model, site)]
    placed = {id(site.act) for site in own}
    experts = [*find_experts(model).values(), *(bank.anchor for bank in banks if isinstance(bank.anchor, MixedBank))]
    placed |= {id(part) for each in experts for part in each.modules()}
    for name, module in owned_activations(model):
        if id(module) not in placed:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, build_elementwise(dense))
    mix_banks(banks, options)
    for site in own:
        settle_kinds(model, [(site, registry[str(site.activation)].flags)], options_of(model, site))
    watch_context(model)
    give_dense_configs(model, dense)
    return [s for s in own if s.widened or not s.act.elementwise or any(s.width in p.shape for p in s.act.parameters())]


def options_of(model: nn.Module, site: Site) -> GluConfig:
    """Return the options of the config that governs a site."""
    return GluConfig.of(governing_configs(model, site)[0])


def build_experts(model: nn.Module, config: Any, sites: list[Site], options: GluConfig) -> list[Site]:
    """Put fresh experts in the chosen sites' places, where the options say so; return the sites that are left."""
    wanted = options.expert_options
    if wanted is None:
        return sites
    chosen = [site for site in sites if site.kind != "experts" and selected(options.layers, site.layer, site.stack)]
    if chosen or find_experts(model):  # which may be those of stacks with a copy of this config
        add_router_fields(config, wanted)
    settle_kinds(model, [(site, flags_of(wanted)) for site in chosen], options)
    for site in chosen:
        bias = site.in_proj.bias is not None if options.bias is None else options.bias
        width = gated_width(options.width, site.width)
        put_experts(model, site, make_experts(site, wanted, bias=bias, width=width, acts=options))
    watch(model)
    names = {site.name for site in chosen}
    return [site for site in sites if site.name not in names]


def mix_banks(banks: list[Site], options: GluConfig) -> None:
    """Give the experts of the chosen banks activations of their own, where the options say so."""
    wanted = options.expert_options
    if wanted is None:
        return
    for bank in banks:
        if selected(options.layers, bank.layer, bank.stack) and not isinstance(bank.anchor, MixedBank):
            mix_bank(bank.anchor, wanted.experts, options.mix, wanted.copies)


def _place_activation(model: nn.Module, site: Site) -> None:
    """Give a site whose class has an activation of its own the one that its config names."""
    config = governing_configs(model, site)[0]
    options = GluConfig.of(config)
    entry = registry.find(options.activation or activation_of(config, site.stack))
    name = options.name_at(entry.name, site.layer, site.stack) if entry else None
    if name and site.activation != (native_gate(name) if site.native else registry[name].name):
        site.set_act(registry[name].factory())


def give_dense_configs(model: nn.Module, dense: str) -> None:
    """Let modules that look an activation up by its name in their forward find the dense one."""
    for module in model.modules():
        for attribute in NAME_ATTRIBUTES:
            if registry.find(module.__dict__.get(attribute)):
                setattr(module, attribute, dense)
        if type(module).__name__ in LOOK_UP_IN_FORWARD and registry.find(activation_of(module.config)):
            private = copy.copy(module.config)
            write_activation(private, dense)
            module.config = private


def check_selection(sites: list[Site], options: GluConfig) -> None:
    """Raise OptionError where ``options.layers`` names a layer that none of ``sites`` has."""
    layers = max((site.layer for site in sites), default=-1) + 1
    for spec in (options.layers, *(check_layers(key) for key in options.by_layer or ())):
        if highest(spec) >= layers:
            raise OptionError(f"layers={spec!r} is out of range: the model has layers 0 to {layers - 1}")


def _build_site(model: nn.Module, site: Site) -> bool:
    """Build one site; return whether it holds an activation of ours afterwards."""
    act = site.act
    assert isinstance(act, OwnedActivation)
    config, options = governing_configs(model, site)[0], options_of(model, site)
    own = set(act.parameters())  # xIELU is built in bfloat16 wherever it is
    like = next(each.dtype for each in site.anchor.parameters() if each not in own)
    if not selected(options.layers, site.layer, site.stack):
        site.set_act(build_elementwise(options.dense_act or default_activation(config, site.stack)).to(like))
        return False
    check_routed(act.name, site)
    if site.native:
        if act.gated:
            site.set_act(build_elementwise(native_gate(act.name)).to(like))
        if isinstance(options.width, int) and site.kind in ("gated", "packed"):
            _resize(site, options.width, bias=site.in_proj.bias is not None)
    elif act.gated and not site.widened:
        bias = site.in_proj.bias is not None if options.bias is None else options.bias
        _resize(site, gated_width(options.width, site.width), bias=bias, widen=True)
    configure(site, options)
    if site.kind == "mixer":
        own_gate(site.anchor, options.dense_act or default_activation(config, site.stack))
    return isinstance(site.act, OwnedActivation)


def _resize(site: Site, width: int, *, bias: bool, widen: bool = False) -> None:
    """Give a site's projections ``width`` units; one that is to be widened gets an up half."""
    *ins, out_proj = projections(site)
    narrower = width != site.width
    for linear in ins if widen or narrower else ():
        resize(linear, 2 * width if widen or site.kind == "packed" else width, site.hidden, bias=bias)
    if narrower:
        resize(out_proj, out_features(out_proj), width, bias=out_proj.bias is not None)


def configure(site: Site, options: GluConfig) -> None:
    """Hand the options to the site's activation, once."""
    act = site.act
    if isinstance(act, OwnedActivation) and not getattr(act, "_configured", False):
        act.configure(options, site.width)
        act.to(dtype=next(each.dtype for each in site.anchor.parameters() if each not in set(act.parameters())))
        act._configured = True  # type: ignore[assignment]


def gated_width(width: int | str | None, dense: int) -> int:
    """Return the number of units of a gated FFN that takes the place of one with ``dense`` units."""
    if isinstance(width, int):
        return width
    return iso_width(dense) if width == "iso" else dense


def native_gate(name: str) -> str:
    """Return the elementwise activation that ``name`` means for a family that multiplies by the up half itself.

    ``stateful_swiglu`` and ``stateful_silu`` are ``stateful_silu``.
    """
    entry = registry[name]
    if (gate := entry.gate if GATED in entry.flags else entry.name) is None:
        raise ConversionError(
            f"{name} ({entry.equation}) is no N(g) * u, which is all that a natively gated family can compute"
        )
    return gate
