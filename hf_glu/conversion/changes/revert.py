"""Undoing a conversion that nothing has been done to since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation import registry
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.activation.learnable import LearnableMix
from hf_glu.activation.moa import TokenMix
from hf_glu.activation.module import innermost
from hf_glu.activation.stock import same_function
from hf_glu.activation.wrapped import shifts
from hf_glu.config.glu import GluConfig
from hf_glu.config.registry import LEARNABLE, core
from hf_glu.conversion.changes.parts import made_with
from hf_glu.conversion.checks import check_values
from hf_glu.conversion.engine import make_plan
from hf_glu.conversion.fit.fitting import Fit
from hf_glu.conversion.forms import ConfigEntry, governed, size
from hf_glu.conversion.routes import APPROXIMATE, ROUNDING, Route, find_route, mix_route, weakest
from hf_glu.conversion.steps import Change, Rows, Step
from hf_glu.conversion.work import Work
from hf_glu.conversion.wrappers import placed_parameters
from hf_glu.errors import ConversionError, NoSiteError
from hf_glu.ffn.config_fields import activation_field
from hf_glu.ffn.context_sites import remove_sources
from hf_glu.ffn.identify import governing_configs, source_activation
from hf_glu.ffn.linear import parameter_count, set_rows, weight_rows
from hf_glu.ffn.mixers import GatedMixer
from hf_glu.ffn.sites import Site, convertible_sites
from hf_glu.inplace import become_stock


@dataclass(frozen=True, kw_only=True, eq=False)
class _Undo:
    """What a site gets back: its activation and, where it was dense, the rows and bias of its in-projection."""

    name: str
    act: nn.Module
    rows: Tensor | None = None
    bias: Tensor | None = None
    promise: str = ROUNDING


def revert(model: Any) -> int:
    """Give ``model`` its FFNs back as they were, in place, where its conversion is as it was made.

    Dense FFNs are dense again, and the gates of families that have some are their own again. The model computes the
    same afterwards; where the conversion was an approximate one, made in this process and not fitted, it computes what
    it did before that.

    Returns:
        The number of sites that were reverted.

    Raises:
        NoSiteError: nothing is converted.
        ConversionError: an FFN was trained, fitted or narrowed, so that no dense one computes the same. Nothing is
            changed then.
    """
    return len(make_plan(model, Revert()).apply(check=False).sites)


@dataclass(frozen=True, kw_only=True)
class Revert(Change):
    """Take a conversion back, at all sites: a config that speaks of some is to be rid of them all."""

    of_all = True

    def choose(self, model: nn.Module, layers: Any, exclude: str | None) -> list[Site]:
        check_values(model)
        sites = [site for site in convertible_sites(model) if site.widened or site.activation]
        if not sites:
            raise NoSiteError(f"{type(model).__name__} has no converted feed-forward network to revert")
        return sites

    @torch.no_grad()
    def plan(self, model: nn.Module, site: Site) -> Step:
        undo = _undo(model, site)
        gone = size(site.act) - size(undo.act)
        if undo.rows is not None:
            gone += parameter_count(site.in_proj) - undo.rows.numel() - (0 if undo.bias is None else undo.bias.numel())
        route, after = Route(name="reverted", promise=undo.promise), site.parameters - gone
        return Step.at(site, self, str(site.activation), undo.name, route, parameters_after=after)

    def added(self, model: nn.Module, steps: tuple[Step, ...]) -> int:
        return -placed_parameters(model)

    def entries(self, model: nn.Module, planned: Rows) -> list[ConfigEntry]:
        names = {step.site.name: step.target for step in planned.steps}
        found = governed(model, [step.site for step in planned.steps])
        wanted = {id(config): _names_of_stacks(model, config, sites, names) for config, sites in found}
        _refuse_others(model, list(names), wanted)
        return [ConfigEntry(config=config, activations=wanted[id(config)], options=None) for config, _ in found]

    @torch.no_grad()
    def apply(self, work: Work, step: Step) -> Fit | None:
        site, undo = step.site, _undo(work.model, step.site)
        if undo.rows is not None:
            set_rows(site.in_proj, undo.rows, undo.bias)
        site.set_act(undo.act.train(site.act.training))
        become_stock(site.anchor, GatedMixer)
        return None

    def finish(self, model: nn.Module, planned: Rows) -> None:
        remove_sources(model)


def _names_of_stacks(
    model: nn.Module, config: Any, sites: list[Site], names: Mapping[str, str]
) -> dict[str | None, str]:
    """Return what a config is to name for the sites of each stack, which may share a field."""
    fields = {site.name: activation_field(config, site.stack) for site in sites}
    found = {}
    for each in sites:
        alike = [site for site in sites if fields[site.name] == fields[each.name]]
        found[each.stack] = names[_own_site(model, config, alike).name]
    return found


def _own_site(model: nn.Module, config: Any, sites: list[Site]) -> Site:
    """Return a site that a config speaks of first: one around others' models stands around their sites, too."""
    return ([site for site in sites if governing_configs(model, site)[0] is config] or sites)[-1]


def _refuse_others(model: Any, undone: list[str], names: Mapping[int, Mapping[str | None, str]]) -> None:
    """Raise where an FFN that can't be undone has another function than its config will name: a changed gate."""
    for site in convertible_sites(model):
        around = [names[id(config)] for config in governing_configs(model, site) if id(config) in names]
        wanted = {name for of_stacks in around for stack, name in of_stacks.items() if stack == site.stack}
        if site.name in undone or not wanted or site.kind == "mixer":
            continue
        if not any(same_function(source_activation(model, site), name) for name in wanted):
            raise ConversionError(
                f"{site.name} can't be reverted: its gate was {', '.join(sorted(wanted))}, and the conversion made it "
                "another function"
            )


def _undo(model: Any, site: Site) -> _Undo:
    options = GluConfig.of(governing_configs(model, site)[0])
    name, why = str(site.activation), f"{site.name} can't be reverted: "
    dense = options.dense_act or (core(name) if site.native else None)
    if dense is None or options.width is not None:
        raise ConversionError(why + ("it is narrower than the dense one was" if dense else "it was never dense"))
    if site.native and not _has(site, dense):
        raise ConversionError(why + f"its gate was {dense}, and the conversion made it another function")
    act = _plain(site, dense)
    if act is None or not all(shift.neutral() for shift in shifts(site.act)):
        raise ConversionError(why + f"{name} isn't {dense} any more: it was trained")
    if site.native:
        return _Undo(name=dense, act=act)
    route = _route(dense, name)
    if route is None:
        raise ConversionError(why + f"{name} has no dense form")
    known = made_with(site)
    if known is False or (known is None and route.promise == APPROXIMATE):
        kind = "its out-projection was trained or fitted" if known is False else "nobody knows its out-projection now"
        raise ConversionError(why + f"{kind}, and {dense} -> {name} was {route.promise}")
    rows, bias = _dense_rows(site, route, options)
    if rows is None:
        raise ConversionError(why + f"its weights are not those that {dense} -> {name} gives: it was trained or fitted")
    return _Undo(name=dense, act=act, rows=rows, bias=bias, promise=weakest(route.promise, ROUNDING))


def _has(site: Site, dense: str) -> bool:
    """Return whether a site's activation is at heart what it was, or a mix that starts there."""
    return isinstance(innermost(site.act)[1], LearnableMix) or same_function(core(str(site.activation)), dense)


def _plain(site: Site, dense: str) -> nn.Module | None:
    """Return the activation inside of ours, where it is ``dense``, or None; its parameters stay."""
    owner, inner = innermost(site.act)
    if isinstance(inner, LearnableMix):
        return _start(inner, dense)
    if site.native:
        return inner
    return inner if owner is not None and core(str(site.activation)) == dense else build_elementwise(dense)


def _start(mix: LearnableMix, dense: str) -> nn.Module | None:
    """Return the function that a mix starts at, None where it has moved."""
    if dense not in mix.names:
        return None
    index = mix.names.index(dense)
    start = torch.zeros_like(mix.mix)
    start[index] = 1
    adapts = isinstance(mix, TokenMix) and mix.choice is not None and bool(mix.choice.any())
    moved = adapts or not torch.equal(mix.coefficients(), start)
    return None if moved else mix.functions[index]


def _route(dense: str, name: str) -> Route | None:
    """Return the route by which a dense FFN became one with the gate ``name``."""
    if LEARNABLE in registry[name].flags:
        return mix_route(dense, gated=True)
    if registry[name].gate is None and registry[name].formula is None:
        return None
    return find_route(dense, name)


def _dense_rows(site: Site, route: Route, options: GluConfig) -> tuple[Tensor | None, Tensor | None]:
    """Return the weight rows and the bias of the dense in-projection; no rows where no dense one gives the gated."""
    rows, bias = weight_rows(site.in_proj), site.in_proj.bias
    s, t, c = route.constants(rows.dtype)
    gate, up = rows.chunk(2)
    old, old_bias = up / t if t else gate / s, None
    untouched = torch.equal(gate, old * s) and torch.equal(up, old * t if t else torch.zeros_like(up))
    if bias is not None:
        gate_bias, up_bias = bias.chunk(2)
        old_bias = (up_bias - c) / t if t else gate_bias / s
        untouched &= torch.equal(gate_bias, old_bias * s) and torch.equal(up_bias, old_bias * t + c)
        if options.bias and not old_bias.any():
            old_bias = None  # the conversion had added it
    return (old.clone() if untouched else None), None if old_bias is None else old_bias.clone()
