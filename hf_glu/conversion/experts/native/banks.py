"""Activations for each expert of Transformers' own banks (Mixtral, Qwen-MoE, OLMoE, gpt-oss, DeepSeek).

Routers and weights stay. An expert whose activation is another computes another function, unless that is a learnable
one, which starts at the old. ``ungated_N`` drops the gate inside an expert ('simplified experts': the router gates
already): out(N(g)) takes the place of out(phi(g) * u), with the out-projection fitted on calibration data.

Shapes: T tokens, H hidden size, W units of an expert, k experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hf_glu.activation import registry
from hf_glu.activation.elementwise import build_elementwise, name_of
from hf_glu.activation.learnable import LearnableMix, mix_options
from hf_glu.activation.module import innermost
from hf_glu.activation.stock import same_function
from hf_glu.compat.of_models import APPLY_GATE
from hf_glu.config.experts import ExpertOptions, Group, read_groups
from hf_glu.config.glu import GluConfig
from hf_glu.config.layers import check_layers, selected
from hf_glu.config.registry import LEARNABLE, unwrapped
from hf_glu.conversion.experts.native.ungating import drop_gates, routed_inputs
from hf_glu.conversion.fit.fitting import Fit
from hf_glu.conversion.forms import ConfigEntry, Form, governed, selection_of, size
from hf_glu.conversion.routes import APPROXIMATE, EXACT, WRAP, Route, exact_targets, weakest
from hf_glu.conversion.steps import Change, Rows, Step
from hf_glu.conversion.work import Work
from hf_glu.errors import ConversionError, NoSiteError, OptionError
from hf_glu.ffn.build import check_selection, mix_banks
from hf_glu.ffn.config_fields import activation_of
from hf_glu.ffn.experts.native import (
    UNGATED,
    MixedBank,
    apply_gate,
    bank_width,
    build_gate,
    built_in,
    check_groups,
    inner_gate,
)
from hf_glu.ffn.identify import enclosing_configs
from hf_glu.ffn.sites import Site, find_banks

CHECK = 64  # random rows that our gate is compared with the family's own on


@dataclass(frozen=True, kw_only=True)
class RegateBank(Change):
    """Give the experts of banks activations of their own; those without a gate are fitted.

    Attributes:
        experts: the activations, such as ``silu*2,relu*2``.
        mix: options of learnable ones.
        acts: what the configs say of all banks, once `rows` knows them.
    """

    experts: str | int | ExpertOptions
    mix: Mapping[str, Any] | None = None
    acts: GluConfig = field(default_factory=GluConfig)

    @property
    def target(self) -> str:
        """The activations, as reports say them."""
        return ",".join(f"{group.name}*{group.count}" for group in self.groups)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The activations; raises OptionError where there are none."""
        given = self.experts.groups if isinstance(self.experts, ExpertOptions) else str(self.experts)
        return read_groups(given) if not given.isdecimal() else ()

    @property
    def drops(self) -> bool:
        """Whether experts lose their gate."""
        return any(group.name.startswith(UNGATED) for group in self.groups)

    def every(self, model: nn.Module) -> list[Site]:
        return find_banks(model)

    def choose(self, model: nn.Module, layers: Any, exclude: str | None) -> list[Site]:
        if exclude:
            raise OptionError("exclude names FFNs; banks of experts are chosen by layers=")
        every = find_banks(model)
        check_selection(every, GluConfig(layers=check_layers(layers)))
        chosen = [bank for bank in every if selected(check_layers(layers), bank.layer, bank.stack)]
        if not chosen:
            raise NoSiteError(f"none of the {len(every)} banks is chosen by layers={layers!r}")
        return chosen

    def form(self, model: nn.Module, site: Site) -> Form:
        bias = bool(getattr(site.anchor, "has_bias", False))
        return Form(activation=bank_source(model, site), width=bank_width(site.anchor), widened=True, bias=bias)

    def rows(self, model: nn.Module, sites: list[Site]) -> tuple[Step, ...]:
        """Return the rows of all banks, whose experts are to be alike.

        Raises:
            ConversionError: experts that compute something else, or that are mixed already.
            OptionError: another number of experts than they have.
        """
        sources = {bank_source(model, bank) for bank in sites}
        if len(sources) != 1:
            raise ConversionError(f"the banks have different activations, {', '.join(sorted(sources))}: choose layers")
        (source,) = sources
        check_bank_groups(self.groups, len(sites[0].anchor.get_parameter("down_proj")))
        learnable = [gate for group in self.groups if _is_mix(gate := inner_gate(group.name)[0])]
        mix = mix_options([source], learnable, self.mix) if learnable else None
        layers = selection_of(sites, find_banks(model))
        experts = ExpertOptions(groups=self.target, top_k=1).to_dict()
        change = replace(self, acts=GluConfig(layers=layers, mix=mix, experts=experts))
        return tuple(change.row(bank, source) for bank in sites)

    def row(self, bank: Site, source: str) -> Step:
        routes = [_route(source, group) for group in self.groups]
        note = "; ".join(dict.fromkeys(route.note for route in routes if route.note))
        name = "experts " + ", ".join(f"{group.name}*{group.count}" for group in self.groups)
        route = Route(name=name, promise=weakest(*(route.promise for route in routes)), note=note)
        width = bank_width(bank.anchor)
        more = bank.parameters + sum(_parameters(group, width, self.acts) for group in self.groups)
        at = {"width_before": width, "width": width, "parameters_after": more}
        return Step.at(bank, self, source, exact_targets(source)[0], route, **at)

    def needs_calibration(self, step: Step) -> bool:
        return self.drops

    def check_calibration(self, steps: tuple[Step, ...], given: bool) -> None:
        """Raise OptionError where experts are to lose their gate and can't be fitted, or the other way round."""
        if self.drops != given:
            raise OptionError("experts that lose their gate, and only those, need calibration= to be fitted on")

    def entries(self, model: nn.Module, planned: Rows) -> list[ConfigEntry]:
        first = planned.steps[0]
        found = []
        for config, sites in governed(model, [step.site for step in planned.steps]):
            options = replace(self.acts, dense_act=GluConfig.of(config).dense_act or first.source).to_dict()
            stacks = dict.fromkeys((site.stack for site in sites), first.target)
            found.append(ConfigEntry(config=config, activations=stacks, options=options))
        return found

    def apply(self, work: Work, step: Step) -> Fit | None:
        """Give one bank its activations; where that drops gates, fit the experts on the tokens routed to them."""
        bank: Any = step.site.anchor
        seen = routed_inputs(work.model, step.site, work.batches or []) if self.drops else None
        mix_banks([step.site], self.acts)
        _start_at(bank, step.source)
        return None if seen is None else drop_gates(bank, step.source, *seen)


def check_bank_groups(groups: tuple[Group, ...], count: int) -> None:
    """Raise where ``groups`` can't be the activations of a bank's ``count`` experts."""
    if not groups:
        raise OptionError(f"the bank has {count} experts already: give their activations, such as silu*{count}")
    check_groups(groups, count)


@torch.no_grad()
def bank_source(model: nn.Module, bank: Site) -> str:
    """Return the activation of a bank's experts.

    Raises:
        ConversionError: they are mixed already, or don't compute act(g) * u in a way that is known.
    """
    module: Any = bank.anchor
    if isinstance(module, MixedBank):
        raise ConversionError(f"{bank.name} has activations for each expert already: convert the checkpoint before it")
    name = built_in(module)
    if name is None:
        names = [found for config in enclosing_configs(model, bank.name) if (found := activation_of(config))]
        name = name_of(module.act_fn, (*names, "silu", "gelu", "gelu_new", "relu"))
    if name is None:
        raise ConversionError(f"{bank.name}: Transformers has no name for its activation")
    if module.down_proj.device.type == "meta":
        return name
    rows = torch.randn(CHECK, 2 * bank_width(module), generator=torch.Generator().manual_seed(0)).to(module.down_proj)
    try:
        theirs, ours = APPLY_GATE.of(module)(rows), apply_gate(module, build_elementwise(name).to(rows), rows)
        same = torch.allclose(theirs.float(), ours.float(), rtol=1e-2, atol=1e-2)
    except (TypeError, AttributeError):
        same = False
    if not same:
        raise ConversionError(f"{bank.name}: {type(module).__name__} gates in a way of its own, which hf_glu can't")
    return name


def _route(source: str, group: Group) -> Route:
    gate, kept = inner_gate(group.name)
    if not kept:
        note = "ungated experts keep the weights of their gate, unused"
        return Route(name="gate dropped, fitted", promise=APPROXIMATE, note=note)
    if same_function(source, unwrapped(gate)) or _is_mix(gate):
        return Route(name="kept" if gate == unwrapped(gate) else WRAP.name, promise=EXACT)
    return Route(name="another gate", promise=APPROXIMATE, note="the function changes: learnable_ names are exact")


def _is_mix(name: str) -> bool:
    entry = registry.find(name)
    return entry is not None and LEARNABLE in entry.flags


def _parameters(group: Group, width: int, acts: GluConfig) -> int:
    """Return how many parameters the activation of a group has."""
    with torch.device("meta"):
        return size(build_gate(group, width, acts))


def _start_at(bank: Any, source: str) -> None:
    for act in bank.acts:
        mix = innermost(act)[1]
        if isinstance(mix, LearnableMix):
            mix.start_at(source, build_elementwise(source).to(mix.mix))
