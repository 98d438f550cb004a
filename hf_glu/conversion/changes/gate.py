"""Gates in the FFNs' places: what a gated activation takes at each site, planned from what the site is now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hf_glu.activation import registry
from hf_glu.activation.learnable import mix_options
from hf_glu.activation.module import OwnedActivation, OwnedModule
from hf_glu.activation.stock import same_function
from hf_glu.config.glu import GluConfig, check_by_layer, check_width, name_at
from hf_glu.config.registry import GATED, LEARNABLE, adds_wrappers, core, reads_text, unwrapped
from hf_glu.conversion.changes.parts import PARTS
from hf_glu.conversion.checks import chosen_sites
from hf_glu.conversion.config_entries import config_entries
from hf_glu.conversion.fit.fitting import Fit, FitOptions, fit_change
from hf_glu.conversion.forms import ConfigEntry, size
from hf_glu.conversion.routes import (
    APPROXIMATE,
    FITTED,
    NO_CHANGE,
    ROUNDING,
    WRAP,
    Route,
    find_route,
    mix_route,
)
from hf_glu.conversion.steps import Change, Rows, Step, Target
from hf_glu.conversion.targets import read_dictionary
from hf_glu.conversion.work import TensorRule, Work
from hf_glu.conversion.wrappers import (
    Sections,
    awake_notes,
    read_options,
    wrapper_parameters,
)
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.build import gated_width, give_dense_configs, native_gate
from hf_glu.ffn.context_sites import Flagged, check_kinds, check_routed, place_parts
from hf_glu.ffn.experts.group import build_activation
from hf_glu.ffn.forward import is_alone
from hf_glu.ffn.identify import source_activation
from hf_glu.ffn.linear import out_features
from hf_glu.ffn.sites import Site

UNBIASED_NOTE = "without a bias, up is fitted to be 1 on the calibration inputs: the error is reported"
NARROW_NOTE = "the units that add most, fitted to the old output: the error is reported"


@dataclass(frozen=True, kw_only=True)
class Gate(Change):
    """Give FFNs gated activations, and the width that is wanted.

    Attributes:
        target: the activation, or one for each selection of layers.
        width: hidden units: ``keep``, ``iso`` or a number.
        fitted: whether there will be calibration data, so that any activation may become any gate.
        bias: False: none for in-projections that have none.
        acts: options of the activations; `rows` gives mixes the functions that they start at.
    """

    target: Target
    width: int | str = "keep"
    fitted: bool = False
    bias: bool | None = None
    acts: GluConfig = field(default_factory=GluConfig)
    foresees = True

    @classmethod
    def of(
        cls, target: Target, *, mix: Mapping[str, Any] | None = None, sections: Sections | None = None, **more: Any
    ) -> Gate:
        """Return the change to a target as users write it, with sections of options by the wrappers' keys.

        Raises:
            HfGluError: it can't be read.
        """
        target, mix = read_dictionary(target, mix)
        if not isinstance(target, str):
            check_by_layer(target)
        names = {"all": target} if isinstance(target, str) else target
        names = {layers: registry[name].name for layers, name in names.items()}
        acts = read_options(names.values(), mix, sections or {})
        return cls(target=target if isinstance(target, str) else names, acts=acts, **more)

    @property
    def targets(self) -> Mapping[str, str]:
        """The activation of each selection of layers."""
        return {"all": registry[self.target].name} if isinstance(self.target, str) else self.target

    def choose(self, model: nn.Module, layers: Any, exclude: str | None) -> list[Site]:
        check_width(None if self.width == "keep" else self.width)
        return chosen_sites(model, layers, exclude, self.targets)

    def plan(self, model: nn.Module, site: Site) -> Step:
        return _step(model, site, str(name_at(self.targets, site.layer, site.stack)), self)

    def rows(self, model: nn.Module, sites: list[Site]) -> tuple[Step, ...]:
        """Return the rows, with what one config says for all of them: biases, and the functions of mixes."""
        steps = [self.plan(model, site) for site in sites]
        check_kinds(model, _flagged(steps), self.acts)
        biased = any(step.adds_bias for step in steps)
        change = replace(self, acts=replace(self.acts, mix=_mix_of(steps, self.acts.mix)))
        return tuple(_with_acts(_with_bias(step) if biased else step, change) for step in steps)

    def added(self, model: nn.Module, steps: tuple[Step, ...]) -> int:
        return wrapper_parameters(model, _flagged(step for step in steps if step.changes), self.acts)

    def needs_calibration(self, step: Step) -> bool:
        return step.needs_fit or FITTED.name in step.route.name

    def check_calibration(self, steps: tuple[Step, ...], given: bool) -> None:
        if not given and any(step.needs_fit for step in steps):
            raise OptionError("fewer hidden units, or no bias, need calibration=: texts or tensors to fit the FFNs on")
        super().check_calibration(steps, given)

    def entries(self, model: nn.Module, planned: Rows) -> list[ConfigEntry]:
        return config_entries(model, planned, self.acts)

    def apply(self, work: Work, step: Step) -> Fit | None:
        """Convert one site, and fit it where its route is approximate and there are calibration data."""
        if work.batches is None or step.route.promise != APPROXIMATE or not is_alone(step.site):
            self._make(step, None)
            return None
        x = work.inputs_ahead(step.site)
        few = FitOptions.steps if step.needs_fit else 0
        options = FitOptions(steps=few if work.distill_steps is None else work.distill_steps)
        return fit_change(step.site, x, lambda: self._make(step, x), options)

    @torch.no_grad()
    def _make(self, step: Step, x: torch.Tensor | None) -> None:
        for part in PARTS:
            if part.needed(step):
                part.apply(step, self.acts, x)

    def finish(self, model: nn.Module, planned: Rows) -> None:
        """Put the sources of context vectors in their places, and leave the dense name to whoever looks one up."""
        place_parts(model, _flagged(step for step in planned.steps if step.changes), self.acts)
        give_dense_configs(model, planned.steps[0].source)

    def tensors(self, step: Step) -> list[TensorRule] | None:
        found = [part.tensors(step) for part in reversed(PARTS) if part.needed(step)]
        return None if None in found else [rule for rules in found if rules for rule in rules]


def _check_by_unit(site: Site, target: str) -> None:
    """Raise ConversionError where an activation stays that has parameters for each unit, some of which are cut."""
    owned = (module for module in site.act.modules() if isinstance(module, OwnedModule))
    if any(site.width in each.shape for module in owned for each in module.parameters(recurse=False)):
        raise ConversionError(
            f"{site.name}: {target} has parameters for each of its {site.width} units: cut units first (width=), then "
            f"convert to {target}"
        )


def _step(model: nn.Module, site: Site, target: str, gate: Gate) -> Step:
    check_routed(target, site)
    if site.kind == "experts" and reads_text(target):
        raise ConversionError(f"{site.name}: a bank of experts sees no sequences, which {target} needs")
    source, before, count = source_activation(model, site), site.width, site.parameters
    after = _target_width(site, gate.width)
    route = _native_route(site, source, target) if site.native else _route(site, source, target, gate.fitted)
    unbiased = gate.bias is False and site.kind == "dense" and bool(route.up_bias) and site.in_proj.bias is None
    if unbiased:
        route = replace(route, name=f"{route.name}, no bias", promise=APPROXIMATE, up_bias=0.0, note=UNBIASED_NOTE)
    if after < before and route is NO_CHANGE:
        _check_by_unit(site, target)
    if after < before:
        units = f"{before} -> {after} units"
        name = units if route is NO_CHANGE else f"{route.name}, {units}"
        route = replace(route, name=name, promise=APPROXIMATE, note=NARROW_NOTE)
    if route is not NO_CHANGE and (awake := awake_notes(registry[target].flags, gate.acts)):
        route = replace(route, promise=APPROXIMATE, note="; ".join(awake))
    gains = GATED in registry[target].flags and not (site.native or site.widened)
    per_unit = _unit_parameters(site, gated=True, bias=gains and bool(route.up_bias))
    fixed = count - before * _unit_parameters(site, gated=not gains, bias=False)
    later = count if after == before and not gains else fixed + after * per_unit
    return Step.at(
        site, gate, source, target, route, width=after, iso=gate.width == "iso", unbiased=unbiased,
        parameters_after=later,
    )  # fmt: skip


def _flagged(steps: Iterable[Step]) -> Flagged:
    return [(step.site, registry[step.target].flags) for step in steps]


def _mix_of(steps: Iterable[Step], given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the options of mixes: the functions of all sites, the given ones, and what they are annealed to."""
    steps = [step for step in steps if step.changes]
    learnable = dict.fromkeys(step.target for step in steps if LEARNABLE in registry[step.target].flags)
    return mix_options([core(step.source) for step in steps], learnable, given) if learnable else None


def _with_bias(step: Step) -> Step:
    """Give an in-projection a bias that others get."""
    new = replace(step, biased=not step.unbiased)
    added = 2 * new.width if new.adds_bias and not step.adds_bias else 0
    return replace(new, parameters_after=new.parameters_after + added)


def _with_acts(step: Step, change: Gate) -> Step:
    """Count the parameters of the new activation, as it is built."""
    more = _act_parameters(step, change.acts) if step.changes else 0
    return replace(step, change=change, parameters_after=step.parameters_after + more)


def _act_parameters(step: Step, options: GluConfig) -> int:
    """Return how many parameters more a site's activation has after a step than before it."""
    name = native_gate(step.target) if step.site.native else step.target
    with torch.device("meta"):
        act = build_activation(name)
        if isinstance(act, OwnedActivation):
            act.configure(options, step.width)
    return size(act) - size(step.site.act)


def _unit_parameters(site: Site, *, gated: bool, bias: bool) -> int:
    """Return the parameters of one hidden unit: its rows in the in-projection(s), its column in the out-projection."""
    if site.kind == "experts":
        return 0
    rows = 2 if gated else 1
    return rows * (site.hidden + (bias or site.in_proj.bias is not None)) + out_features(site.out_proj)


def _target_width(site: Site, width: int | str) -> int:
    """Return the width that a site is to have; one that is gated already has equal parameters as it is."""
    if width in ("keep", "iso") and (width == "keep" or site.native or site.widened):
        return site.width
    if not is_alone(site):
        raise ConversionError(f"{site.name}: the width of a {site.kind} can't be changed")
    wanted = gated_width(width, site.width)
    if wanted > site.width:
        raise OptionError(f"width={wanted} is more than the {site.width} hidden units of {site.name}")
    return wanted


def _route(site: Site, source: str, target: str, fitted: bool) -> Route:
    if site.activation:
        if source != target and adds_wrappers(source, target):
            return WRAP
        if source != target:
            raise ConversionError(
                f"{site.name} is converted to {source} already: convert the dense checkpoint to {target} instead"
            )
        return NO_CHANGE
    if LEARNABLE in registry[target].flags:
        return mix_route(source, gated=GATED in registry[target].flags)
    try:
        return find_route(source, target)
    except ConversionError:
        if not fitted:
            raise
        return FITTED


def _native_route(site: Site, source: str, target: str) -> Route:
    gate = native_gate(target)
    if same_function(source, gate):
        return NO_CHANGE
    if adds_wrappers(source, gate) or (gate != unwrapped(gate) and same_function(source, unwrapped(gate))):
        return WRAP
    if LEARNABLE in registry[target].flags:
        if (had := registry.find(source)) is not None and LEARNABLE in had.flags:
            raise ConversionError(f"the gate is {source} already")
        route = mix_route(source, gated=False)
        return replace(route, promise=ROUNDING) if site.kind == "mixer" else route
    return Route(
        name=f"gate activation {source} -> {gate}",
        promise=APPROXIMATE,
        note="natively gated: the function changes, fine-tune it",
    )
