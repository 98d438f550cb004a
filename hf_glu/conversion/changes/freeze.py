"""Folding learnable mixes that have become pure into the plain activation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_glu.activation import registry
from hf_glu.activation.learnable import LearnableMix, mixes
from hf_glu.activation.module import OwnedActivation, innermost
from hf_glu.activation.wrapped import WrappedGate
from hf_glu.config.experts import ExpertOptions, Group, write_groups
from hf_glu.config.glu import GluConfig
from hf_glu.config.registry import GATED, unmixed
from hf_glu.conversion.engine import make_plan
from hf_glu.conversion.fit.fitting import Fit
from hf_glu.conversion.forms import ConfigEntry, size
from hf_glu.conversion.routes import EXACT, Route
from hf_glu.conversion.steps import Change, Rows, Step
from hf_glu.conversion.work import Work
from hf_glu.errors import ConversionError, NoSiteError
from hf_glu.ffn.build import native_gate
from hf_glu.ffn.config_fields import activation_of
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.experts.group import Bank
from hf_glu.ffn.families import SiteRow
from hf_glu.ffn.identify import enclosing_configs
from hf_glu.ffn.sites import Site, find_sites, layer_of

# a group of our experts, seen as a site
GROUP = SiteRow(layout="hf_glu experts", kind="experts", in_proj="in_proj", act="acts.0", out_proj="out_proj")


def freeze_mix(model: Any) -> None:
    """Replace every learnable mix by the plain activation that it was annealed to, in place.

    The model computes the same afterwards, and its config names the plain activation and nothing else.

    Raises:
        NoSiteError: the model has no learnable mix.
        ConversionError: a mix isn't pure: anneal it to the end first. Nothing is changed then.
    """
    make_plan(model, FreezeMix()).apply(check=False)


@dataclass(frozen=True, kw_only=True)
class FreezeMix(Change):
    """Put the plain activation in a pure mix's place, at all sites: a config that speaks of some speaks of all."""

    of_all = True
    rewrites = False

    def every(self, model: nn.Module) -> list[Site]:
        sites = [site for site in find_sites(model) if isinstance(site.act, OwnedActivation) and mixes(site.act)]
        return sites + [
            Site(name=name, row=GROUP, path=name, anchor=bank, layer=layer_of(name), stack=None)
            for name, bank in model.named_modules()
            if isinstance(bank, Bank) and mixes(bank.act)
        ]

    def choose(self, model: nn.Module, layers: Any, exclude: str | None) -> list[Site]:
        if not (sites := self.every(model)):
            raise NoSiteError(f"{type(model).__name__} has no learnable activation to freeze")
        return sites

    def plan(self, model: nn.Module, site: Site) -> Step:
        found = [mix for act in _acts(site) for mix in mixes(act)]
        for mix in found:
            if not mix.is_pure():
                raise ConversionError(
                    f"{site.name}: the mix is annealed to {float(mix.annealed):.0%} only, so that freezing it would "
                    "change the model: hf_glu.anneal(model, 1.0) first"
                )
        gone = sum(size(mix) - size(_plain(mix)) for mix in found)
        name = site.anchor.name if isinstance(site.anchor, Bank) else str(site.activation)
        before = size(site.anchor) if site.row is GROUP else site.parameters
        sizes = {"parameters_before": before, "parameters_after": before - gone}
        return Step.at(site, self, name, unmixed(name), Route(name="mix folded", promise=EXACT), **sizes)

    def entries(self, model: nn.Module, planned: Rows) -> list[ConfigEntry]:
        native = all(step.site.native for step in planned.steps if step.site.row is not GROUP)
        around = {id(c): c for step in planned.steps for c in enclosing_configs(model, step.site.name)}
        stacks = {step.site.stack for step in planned.steps}
        return [entry for config in around.values() if (entry := _entry(config, stacks, native=native)) is not None]

    def apply(self, work: Work, step: Step) -> Fit | None:
        bank = step.site.anchor
        if not isinstance(bank, Bank):
            step.site.set_act(_folded(step.site.act))
            return None
        bank.name = unmixed(bank.name)
        for place, act in enumerate(bank.acts):
            bank.acts[place] = _folded(act)
        return None

    def finish(self, model: nn.Module, planned: Rows) -> None:
        for experts in find_experts(model).values():  # whose routers know the names, too
            experts.options = experts.router.options = plain_experts(experts.options)


def _acts(site: Site) -> list[nn.Module]:
    return list(site.anchor.acts) if isinstance(site.anchor, Bank) else [site.act]


def _plain(mix: LearnableMix) -> nn.Module:
    """Return the function that a pure mix computes."""
    plain: nn.Module = mix.functions[mix.names.index(mix.target)]
    return plain


def _folded(act: nn.Module) -> nn.Module:
    """Return the plain activation that a pure mix computes; wrappers around it stay."""
    owner, mix = innermost(act)
    assert isinstance(mix, LearnableMix)
    plain = _plain(mix).train(act.training)
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


def _entry(config: Any, stacks: Collection[str | None], *, native: bool) -> ConfigEntry | None:
    """Return what a config is to say in place of learnable names, of FFNs in ``stacks``; None: it says none."""
    options = GluConfig.of(config)
    said, own_names = options.to_dict(), {stack: activation_of(config, stack) for stack in stacks}
    names = [each for each in (*own_names.values(), options.activation, *(options.by_layer or {}).values()) if each]
    learnable = any(other != unmixed(other) for other in names)
    if options.expert_options is not None:
        said["experts"] = plain_experts(options.expert_options).to_dict()
    elif not learnable:
        return None
    said.pop("mix", None)
    if options.activation:
        said["activation"] = unmixed(options.activation)
    if learnable and options.by_layer:
        said["by_layer"] = {layers: unmixed(other) for layers, other in options.by_layer.items()}
    written = {stack: unmixed(name) for stack, name in own_names.items() if name}
    if not learnable or not written:
        return ConfigEntry(config=config, activations={}, options=said)
    base = next(iter(written.values()))
    entry = registry.find(base)
    own = {"layers", "by_layer", "width", "experts", *registry.sections} & set(said)
    plain = native and not own and entry is not None and GATED in entry.flags
    written = {stack: native_gate(name) if plain else name for stack, name in written.items()}
    return ConfigEntry(config=config, activations=written, options=None if plain or entry is None else said)
