"""Activations for each expert of Transformers' own banks (Mixtral, Qwen-MoE, OLMoE, gpt-oss, DeepSeek).

Routers and weights stay. An expert whose activation is another computes another function, unless that is a learnable
one, which starts at the old. ``ungated_N`` drops the gate inside an expert ('simplified experts': the router gates
already): out(N(g)) takes the place of out(phi(g) * u), with the out-projection fitted on calibration data.

Shapes: T tokens, H hidden size, W units of an expert, k experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_glu.activation import build_elementwise, registry
from hf_glu.activation.elementwise import name_of, same_function
from hf_glu.activation.learnable import LearnableMix, mix_options
from hf_glu.compat.of_models import APPLY_GATE
from hf_glu.config.experts import ExpertOptions, Group, read_groups
from hf_glu.config.glu import GluConfig
from hf_glu.config.layers import check_layers, selected
from hf_glu.config.registry import LEARNABLE
from hf_glu.conversion.checks import check_convertible, check_values
from hf_glu.conversion.config_entries import selection_of
from hf_glu.conversion.experts.ungating import drop_gates, routed_inputs
from hf_glu.conversion.fit.calibration import make_batches
from hf_glu.conversion.foresight import check_comes_back
from hf_glu.conversion.measure import Comparison
from hf_glu.conversion.report import Report, SiteReport
from hf_glu.conversion.routes import APPROXIMATE, EXACT, Route, exact_targets
from hf_glu.conversion.steps import Plan, Step
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.build import check_selection, mix_banks
from hf_glu.ffn.config_fields import activation_of, write_activation
from hf_glu.ffn.experts.native import UNGATED, MixedBank, apply_gate, bank_width, built_in, check_groups, inner_gate
from hf_glu.ffn.identify import enclosing_configs, governing_configs
from hf_glu.ffn.sites import Site, find_banks

CHECK = 64  # random rows that our gate is compared with the family's own on


def convert_banks(
    model: Any, experts: str | int | ExpertOptions, *, layers: Any, exclude: Any, calibration: Any, tokenizer: Any,
    inputs: Mapping[str, Any] | None, check: bool | str, mix: Mapping[str, Any] | None,
) -> Report:  # fmt: skip
    """Give the experts of the chosen banks activations of their own, in place; see `hf_glu.convert`.

    Raises:
        ConversionError: a family whose experts compute something else, or that are mixed already.
        OptionError: another number of experts, or ungated ones without calibration data.
    """
    check_convertible(model)
    check_values(model)
    if exclude:
        raise OptionError("exclude names FFNs; banks of experts are chosen by layers=")
    every = find_banks(model)
    check_selection(every, GluConfig(layers=check_layers(layers)))
    chosen = [bank for bank in every if selected(check_layers(layers), bank.layer, bank.stack)]
    sources = {bank_source(model, bank) for bank in chosen}
    if len(sources) != 1:
        raise ConversionError(f"the banks have different activations, {', '.join(sorted(sources))}: choose layers")
    (source,) = sources
    groups = read_bank_groups(experts, len(chosen[0].anchor.get_parameter("down_proj")))
    routes = {group: _route(source, group) for group in groups}
    drops = any(group.name.startswith(UNGATED) for group in groups)
    if drops != (calibration is not None):
        raise OptionError("experts that lose their gate, and only those, need calibration= to be fitted on")
    batches = make_batches(model, calibration, tokenizer) if drops else []
    comparison = Comparison(model, [], inputs, check=check) if check else None
    before = {bank.name: bank.parameters for bank in chosen}
    total = sum(parameter.numel() for parameter in model.parameters())
    options = _write(model, chosen, every, source, groups, mix)
    fits = {}
    for bank in chosen:
        seen = routed_inputs(model, bank, batches) if drops else None
        mix_banks([bank], options)
        _start_at(bank.anchor, source)
        fits[bank.name] = None if seen is None else drop_gates(bank.anchor, source, *seen)
    check_comes_back(model)
    steps = tuple(_step(bank, source, groups, list(routes.values()), before[bank.name]) for bank in chosen)
    plan = Plan(
        target=options.experts["groups"] if options.experts else "", steps=steps, parameters_before=total,
        parameters_after=sum(parameter.numel() for parameter in model.parameters()),
        bytes_per_parameter=next(model.parameters()).element_size(),
    )  # fmt: skip
    reports = tuple(SiteReport(step=step, relative_error=None, fit=fits[step.site.name]) for step in steps)
    differences = comparison.finish(plan.promise)[0] if comparison else None
    return Report(plan=plan, sites=reports, differences=differences)


def read_bank_groups(experts: str | int | ExpertOptions, count: int) -> tuple[Group, ...]:
    """Return the activations of a bank's ``count`` experts; raise where they aren't as many, or not gates."""
    if isinstance(experts, ExpertOptions):
        experts = experts.groups
    groups = read_groups(str(experts)) if not str(experts).isdecimal() else ()
    if not groups:
        raise OptionError(f"the bank has {count} experts already: give their activations, such as silu*{count}")
    check_groups(groups, count)
    return groups


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
    if same_function(source, gate) or _is_mix(gate):
        return Route(name="kept", promise=EXACT)
    return Route(name="another gate", promise=APPROXIMATE, note="the function changes: learnable_ names are exact")


def _is_mix(name: str) -> bool:
    entry = registry.find(name)
    return entry is not None and LEARNABLE in entry.flags


def _write(
    model: Any, chosen: list[Site], every: list[Site], source: str, groups: tuple[Group, ...],
    mix: Mapping[str, Any] | None,
) -> GluConfig:  # fmt: skip
    """Write into the configs that these banks have activations for each expert; return the options."""
    text = ",".join(f"{group.name}*{group.count}" for group in groups)
    learnable = [gate for group in groups if _is_mix(gate := inner_gate(group.name)[0])]
    options = GluConfig()
    for config in {id(c): c for bank in chosen for c in governing_configs(model, bank)}.values():
        options = GluConfig(
            dense_act=GluConfig.of(config).dense_act or source,
            layers=selection_of(chosen, every),
            mix=mix_options([source], learnable, mix) if learnable else None,
            experts=ExpertOptions(groups=text, top_k=1).to_dict(),
        )
        write_activation(config, exact_targets(source)[0])
        config.hf_glu = options.to_dict()
    return options


def _start_at(bank: Any, source: str) -> None:
    for act in bank.acts:
        if isinstance(act, LearnableMix):
            act.start_at(source, build_elementwise(source).to(act.mix))


def _step(bank: Site, source: str, groups: tuple[Group, ...], routes: list[Route], before: int) -> Step:
    promise = max((route.promise for route in routes), key=(EXACT, APPROXIMATE).index)
    note = "; ".join(dict.fromkeys(route.note for route in routes if route.note))
    name = "experts " + ", ".join(f"{group.name}*{group.count}" for group in groups)
    width = bank_width(bank.anchor)
    return Step(
        site=bank, source=source, target=exact_targets(source)[0], route=Route(name=name, promise=promise, note=note),
        width_before=width, width=width, iso=False, unbiased=False, parameters_before=before,
        parameters_after=bank.parameters,
    )  # fmt: skip
