"""Folding learnable mixes that have become pure into the plain activation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from hf_glu.activation import OwnedActivation, registry
from hf_glu.activation.learnable import LearnableMix, mixes
from hf_glu.activation.module import innermost
from hf_glu.activation.wrapped import WrappedGate
from hf_glu.config.experts import ExpertOptions, Group, write_groups
from hf_glu.config.glu import GluConfig
from hf_glu.config.registry import GATED, unmixed
from hf_glu.conversion.transaction import whole
from hf_glu.errors import ConversionError, NoSiteError
from hf_glu.ffn.build import native_gate
from hf_glu.ffn.config_fields import activation_of, write_activation
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.experts.group import Bank
from hf_glu.ffn.identify import enclosing_configs
from hf_glu.ffn.sites import find_sites


@whole
def freeze_mix(model: Any) -> None:
    """Replace every learnable mix by the plain activation that it was annealed to, in place.

    The model computes the same afterwards, and its config names the plain activation and nothing else.

    Raises:
        NoSiteError: the model has no learnable mix.
        ConversionError: a mix isn't pure: anneal it to the end first. Nothing is changed then.
    """
    sites = [site for site in find_sites(model) if isinstance(site.act, OwnedActivation) and mixes(site.act)]
    banks = {name: bank for name, bank in model.named_modules() if isinstance(bank, Bank) and mixes(bank.act)}
    if not sites and not banks:
        raise NoSiteError(f"{type(model).__name__} has no learnable activation to freeze")
    acts = {site.name: site.act for site in sites}
    acts |= {f"{name}.acts.{place}": act for name, bank in banks.items() for place, act in enumerate(bank.acts)}
    for where, act in acts.items():
        for mix in mixes(act):
            if not mix.is_pure():
                raise ConversionError(
                    f"{where}: the mix is annealed to {float(mix.annealed):.0%} only, so that freezing it would "
                    "change the model: hf_glu.anneal(model, 1.0) first"
                )
    configs = {id(config): config for where in acts for config in enclosing_configs(model, where)}
    for site in sites:
        site.set_act(_folded(site.act))
    for bank in banks.values():
        bank.name = unmixed(bank.name)
        for place, act in enumerate(bank.acts):
            bank.acts[place] = _folded(act)
    for experts in find_experts(model).values():
        experts.options = experts.router.options = plain_experts(experts.options)
    for config in configs.values():
        name = activation_of(config)
        if (options := GluConfig.of(config).expert_options) is not None:
            entry = {**GluConfig.of(config).to_dict(), "experts": plain_experts(options).to_dict()}
            entry.pop("mix", None)
            config.hf_glu = entry
        if name is not None and any(other != unmixed(other) for other in (name, *(by_layer(config) or {}).values())):
            _write(config, unmixed(name), native=all(site.native for site in sites))


def _folded(act: nn.Module) -> nn.Module:
    """Return the plain activation that a pure mix computes; wrappers around it stay."""
    owner, mix = innermost(act)
    assert isinstance(mix, LearnableMix)
    plain: nn.Module = mix.functions[mix.names.index(mix.target)].train(act.training)
    if owner is None:
        return plain
    owner.phi = plain
    for module in act.modules():
        if isinstance(module, OwnedActivation):
            module.name = unmixed(module.name)
        if isinstance(module, WrappedGate):
            module.base = unmixed(module.base)
    return act


def plain_experts(options: ExpertOptions) -> ExpertOptions:
    """Return the options with plain names in place of learnable ones."""

    def plain(groups: tuple[Group, ...]) -> str:
        return write_groups(tuple(replace(group, name=unmixed(group.name)) for group in groups))

    shared = plain(options.always_on) if options.shared else None
    return replace(options, groups=plain(options.experts), shared=shared)


def by_layer(config: Any) -> dict[str, str] | None:
    """Return the activations that a config names by layer, or None."""
    return GluConfig.of(config).by_layer


def _write(config: Any, base: str, *, native: bool) -> None:
    entry = registry.find(base)
    options = GluConfig.of(config).to_dict()
    options.pop("mix", None)
    if names := by_layer(config):
        options["by_layer"] = {layers: unmixed(other) for layers, other in names.items()}
    plain = (
        native
        and not {"layers", "by_layer", "width", *registry.sections} & set(options)
        and entry is not None
        and GATED in entry.flags
    )
    write_activation(config, native_gate(base) if plain else base)
    config.hf_glu = None if plain or entry is None else options
