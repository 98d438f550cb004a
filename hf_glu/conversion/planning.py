"""What a conversion would do, before it does it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_glu.activation import OwnedActivation, registry
from hf_glu.activation.elementwise import same_function
from hf_glu.config.glu import GluConfig, check_by_layer, check_width
from hf_glu.config.layers import check_layers
from hf_glu.config.registry import ADAPTIVE, GATED, LEARNABLE, adds_wrappers, unwrapped
from hf_glu.conversion.checks import check_convertible
from hf_glu.conversion.routes import APPROXIMATE, ROUNDING, WRAP, Route, find_route, mix_route
from hf_glu.conversion.steps import FITTED, NO_CHANGE, Plan, Step, Target, mix_of
from hf_glu.conversion.targets import check_sections, read_dictionary
from hf_glu.errors import ConversionError, NoSiteError, OptionError
from hf_glu.ffn.build import check_selection, gated_width, native_gate
from hf_glu.ffn.context_sites import check_kinds, needed_parts
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.experts.group import build_activation
from hf_glu.ffn.identify import source_activation
from hf_glu.ffn.linear import out_features
from hf_glu.ffn.sites import Site, convertible_sites

UNBIASED_NOTE = "without a bias, up is fitted to be 1 on the calibration inputs: the error is reported"
NARROW_NOTE = "the units that add most, fitted to the old output: the error is reported"


def plan(
    model: Any,
    target: Target,
    *,
    width: int | str = "keep",
    layers: Any = None,
    exclude: str | None = None,
    fitted: bool = False,
    bias: bool | None = None,
    mix: Mapping[str, Any] | None = None,
    **sections: Mapping[str, Any] | None,
) -> Plan:
    """Plan the conversion of ``model``'s FFNs to gated activations; nothing is changed.

    Args:
        model: a Transformers model of any head.
        target: a gated name, see `hf_glu.activations`; or one for each selection of layers, ``{"0-3": "geglu",
            "4,5": "swiglu"}`` (the first key that selects a layer counts; the layers that none selects stay dense).
            A mix may have its dictionary in parentheses, ``moa_swiglu(silu,relu)``.
        width: hidden units: ``keep``, ``iso`` (as many parameters as the dense FFN has, see `iso_width`)
            or a number. FFNs that are gated already are pruned to the number.
        layers: which layers (see :mod:`hf_glu.config.layers`); None: all.
        exclude: regular expression; sites whose name it finds are left alone.
        fitted: whether the FFNs will be fitted to calibration data, so that any activation may become any gate.
        bias: False: give no bias to in-projections that have none (T5), even where the route needs one.
        mix: options of ``learnable_`` and ``moa_`` ones, as ``config.hf_glu["mix"]`` has them; the model's own
            activation comes first in any dictionary.
        sections: options of wrappers, as ``config.hf_glu`` has them: ``state`` of ``stateful_`` activations (see
            `hf_glu.config.state.StateOptions`), ``context`` of ``modulated_`` ones (`hf_glu.config.context.
            ContextOptions`), ``canon={"kernel": 4}`` of ``canon_`` ones, and so on.

    Raises:
        UnknownNameError: unknown target or option.
        OptionError: a width that can't be.
        NoSiteError: no FFN site, or none chosen.
        ConversionError: no route, converted to something else already, or a model that can't be converted as it is.
    """
    check_sections(sections, plan)
    target, mix = read_dictionary(target, mix)
    targets = _targets(target)
    options = read_options(targets.values(), mix, sections)
    check_convertible(model)
    check_width(None if width == "keep" else width)
    sites = chosen_sites(model, targets, layers, exclude)
    check_kinds(model, [(site, registry[name].flags) for site, name in sites], options)
    steps = tuple(_step(model, site, name, width, fitted, bias) for site, name in sites)
    steps = _with_biases(_awake(steps, options))
    steps = _with_activations(steps, replace(options, mix=mix_of(steps, mix)))
    beside = sum(part.parameters for part in needed_parts(model, flagged(steps), options) if not part.taken)
    total = sum(parameter.numel() for parameter in model.parameters())
    added = sum(step.parameters_after - step.parameters_before for step in steps)
    return Plan(
        target=target if isinstance(target, str) else targets,
        steps=steps,
        parameters_before=total,
        parameters_after=total + added + beside,
        bytes_per_parameter=next(model.parameters()).element_size(),
        sections=options.sections,
        given=mix,
    )


def _targets(target: Target) -> dict[str, str]:
    """Return the target of each selection of layers."""
    if not isinstance(target, str):
        check_by_layer(target)
    targets = {"all": target} if isinstance(target, str) else target
    return {layers: registry[name].name for layers, name in targets.items()}


def read_options(
    names: Iterable[str], mix: Mapping[str, Any] | None, sections: Mapping[str, Mapping[str, Any] | None]
) -> GluConfig:
    """Return the options of the activations ``names``; raise OptionError for one that none of them is for."""
    names = list(names)
    flags = {flag for entry in map(registry.find, names) if entry for flag in entry.flags}
    given = [(key, sections.get(key), kind.flag) for key, kind in registry.sections.items()]
    for key, entry, flag in (*given, ("mix", mix, LEARNABLE)):
        if entry is not None and flag not in flags:
            raise OptionError(f"{key} is for {flag}_swiglu and other {flag} names, not {', '.join(names)}")
    if ADAPTIVE not in flags and (useless := sorted({"gate", "rank"} & set(mix or {}))):
        raise OptionError(f"mix {useless[0]} is for moa_swiglu and other moa names, not {', '.join(names)}")
    kinds = registry.sections.items()
    changed = {key: kind.section.from_dict(sections.get(key)).to_dict() or None for key, kind in kinds if kind.section}
    return GluConfig(mix=None if mix is None else dict(mix), sections=changed)


def flagged(steps: tuple[Step, ...]) -> list[tuple[Site, frozenset[str]]]:
    """Return the sites that are changed, with the flags of what they get."""
    return [(step.site, registry[step.target].flags) for step in steps if step.changes]


def awake_notes(flags: Collection[str], options: GluConfig) -> list[str]:
    """Return why activations with these flags have an effect from the start; nothing: they have none."""
    sections = [
        options.read(kind.section) for kind in registry.sections.values() if kind.flag in flags and kind.section
    ]
    return [section.awake for section in sections if not section.neutral]


def _with_biases(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Give all in-projections a bias where one gets one."""
    if not any(step.adds_bias for step in steps):
        return steps
    biased = [replace(step, biased=not step.unbiased) for step in steps]
    return tuple(
        replace(new, parameters_after=new.parameters_after + 2 * new.width)
        if new.adds_bias and not step.adds_bias
        else new
        for step, new in zip(steps, biased, strict=True)
    )


def _with_activations(steps: tuple[Step, ...], options: GluConfig) -> tuple[Step, ...]:
    """Count the parameters of the new activations, as they are built."""
    return tuple(
        replace(step, parameters_after=step.parameters_after + _act_parameters(step, options)) if step.changes else step
        for step in steps
    )


def _act_parameters(step: Step, options: GluConfig) -> int:
    """Return how many parameters more a site's activation has after a step than before it."""
    name = native_gate(step.target) if step.site.native else step.target
    with torch.device("meta"):
        act = build_activation(name)
        if isinstance(act, OwnedActivation):
            act.configure(options, step.width)
    after, before = (sum(part.numel() for part in made.parameters()) for made in (act, step.site.act))
    return after - before


def chosen_sites(
    model: nn.Module, targets: Mapping[str, str], layers: Any, exclude: str | None
) -> list[tuple[Site, str]]:
    """Return the sites that ``layers`` and ``targets`` select and ``exclude`` doesn't find, with their targets."""
    if find_experts(model):
        raise ConversionError(
            f"{type(model).__name__} has experts of hf_glu's already: convert the dense checkpoint instead"
        )
    sites = convertible_sites(model)
    if not sites:
        raise NoSiteError(f"{type(model).__name__} has no feed-forward network that hf_glu knows")
    options = GluConfig(layers=check_layers(layers), by_layer=dict(targets))
    check_selection(sites, options)
    try:
        pattern = re.compile(exclude) if exclude else None
    except re.error as error:
        raise OptionError(f"exclude={exclude!r} is no regular expression: {error}") from None
    named = [(site, options.name_at(None, site.layer, site.stack)) for site in sites]
    chosen = [(site, name) for site, name in named if name and not (pattern and pattern.search(site.name))]
    if not chosen:
        raise NoSiteError(f"none of the {len(sites)} sites is chosen by layers={layers!r}, exclude={exclude!r}")
    return chosen


def _step(model: nn.Module, site: Site, target: str, width: int | str, fitted: bool, bias: bool | None) -> Step:
    if site.kind == "experts" and target != unwrapped(target):
        raise ConversionError(f"{site.name}: a bank of experts sees no sequences, which {target} needs")
    source, before, count = source_activation(model, site), site.width, site.parameters
    after = _target_width(site, width)
    route = _native_route(site, source, target) if site.native else _route(site, source, target, fitted)
    unbiased = bias is False and site.kind == "dense" and bool(route.up_bias) and site.in_proj.bias is None
    if unbiased:
        route = replace(route, name=f"{route.name}, no bias", promise=APPROXIMATE, up_bias=0.0, note=UNBIASED_NOTE)
    if after < before:
        units = f"{before} -> {after} units"
        name = units if route is NO_CHANGE else f"{route.name}, {units}"
        route = replace(route, name=name, promise=APPROXIMATE, note=NARROW_NOTE)
    gains = GATED in registry[target].flags and not (site.native or site.widened)
    per_unit = _unit_parameters(site, gated=True, bias=gains and bool(route.up_bias))
    fixed = count - before * _unit_parameters(site, gated=not gains, bias=False)
    later = count if after == before and not gains else fixed + after * per_unit
    return Step(
        site=site, source=source, target=target, route=route, width_before=before, width=after,
        iso=width == "iso", unbiased=unbiased,
        parameters_before=count, parameters_after=later,
    )  # fmt: skip


def _awake(steps: tuple[Step, ...], options: GluConfig) -> tuple[Step, ...]:
    """Say so of steps whose wrappers have an effect from the start."""
    notes = ["; ".join(awake_notes(registry[step.target].flags, options)) if step.changes else "" for step in steps]
    return tuple(
        replace(step, route=replace(step.route, promise=APPROXIMATE, note=note)) if note else step
        for step, note in zip(steps, notes, strict=True)
    )


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
    if site.kind in ("experts", "mixer"):
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
