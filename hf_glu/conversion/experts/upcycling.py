"""Dense FFNs into experts (Sparse Upcycling, https://arxiv.org/abs/2212.05055), each with an activation of its own.

Every expert is a copy of the dense FFN, by the route to its activation. Weights of the experts that a token uses sum to
1, so that the model computes the same as long as all routes are exact, whatever the router says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation import registry
from hf_glu.activation.context import watch_context
from hf_glu.activation.elementwise import is_elementwise, same_function
from hf_glu.activation.learnable import mix_options
from hf_glu.config.experts import ExpertOptions, Group, read_groups, write_groups
from hf_glu.config.glu import GluConfig
from hf_glu.config.registry import LEARNABLE, unwrapped
from hf_glu.conversion.checks import check_convertible, check_values
from hf_glu.conversion.config_entries import selection_of
from hf_glu.conversion.experts.copying import Source, fill, read_source
from hf_glu.conversion.foresight import check_comes_back
from hf_glu.conversion.measure import Comparison
from hf_glu.conversion.planning import awake_notes, chosen_sites, read_options
from hf_glu.conversion.report import Report, SiteReport
from hf_glu.conversion.routes import APPROXIMATE, EXACT, Route, find_route, mix_route, weakest
from hf_glu.conversion.steps import Plan, Step
from hf_glu.errors import ConversionError, OptionError, UnknownNameError, nearest
from hf_glu.ffn.build import give_dense_configs
from hf_glu.ffn.config_fields import activation_field, write_activation
from hf_glu.ffn.context_sites import check_kinds, place_parts
from hf_glu.ffn.expert_sites import make_experts, put_experts
from hf_glu.ffn.experts import ExpertFFN
from hf_glu.ffn.experts.group import flags_of, is_gated
from hf_glu.ffn.experts.losses import watch
from hf_glu.ffn.identify import governing_configs
from hf_glu.ffn.sites import Site, convertible_sites, find_sites
from hf_glu.instruments.routing import active_parameters

COPY = Route(name="copy", promise=EXACT)
OTHER_NOTE = "the function changes: learnable_ names are exact"
OTHER = Route(name="copy, other activation", promise=APPROXIMATE, note=OTHER_NOTE)
SEED = 0


def expert_options(experts: str | int | ExpertOptions, target: str, top_k: int | None) -> ExpertOptions:
    """Return the options that `hf_glu.convert`'s ``experts`` and ``top_k`` mean.

    Raises:
        OptionError, UnknownNameError: they can't be read, or name no activation.
    """
    if not isinstance(experts, ExpertOptions):
        groups = write_groups(read_groups(str(experts), default=target))
        experts = ExpertOptions(groups=groups, top_k=ExpertOptions.top_k if top_k is None else top_k)
    for group in (*experts.experts, *experts.always_on):
        if registry.find(group.name) is None and not is_elementwise(group.name):
            raise UnknownNameError(
                f"experts have the unknown activation {group.name!r}; {nearest(group.name, [e.name for e in registry])}"
            )
    return experts


def upcycle(
    model: Any, target: str, options: ExpertOptions, *, layers: Any, exclude: str | None, drop: float, inputs: Any,
    check: bool | str, mix: Mapping[str, Any] | None, sections: Mapping[str, Mapping[str, Any] | None],
) -> Report:  # fmt: skip
    """Turn the chosen FFNs into experts, in place; see `hf_glu.convert`.

    Raises:
        ConversionError: an FFN that is a bank of experts already, or a group that can't be made of it.
    """
    if not 0 <= drop < 1:
        raise OptionError(f"drop must be a share of the units, 0 up to 1, got {drop}")
    check_convertible(model)
    check_values(model)
    sources, routes = expert_routes(model, target, options, layers=layers, exclude=exclude)
    sites = [source.site for source in sources]
    layers = selection_of(sites, convertible_sites(model))
    named = [group.name for group in (*options.experts, *options.always_on)]
    acts = read_options(named, _mix([source.name for source in sources], options, mix), sections)
    flagged = [(site, flags_of(options)) for site in sites]
    check_kinds(model, flagged, acts)
    total = sum(parameter.numel() for parameter in model.parameters())
    comparison = Comparison(model, [], inputs, check=check) if check else None
    bias = [s.bias is not None or any(r.up_bias for r in each) for s, each in zip(sources, routes, strict=True)]
    generator = torch.Generator().manual_seed(SEED)
    steps = []
    configs = {id(config): config for site in sites for config in governing_configs(model, site)}
    place_parts(model, flagged, acts)
    for source, found, has_bias in zip(sources, routes, bias, strict=True):
        site = source.site
        experts = make_experts(site, options, bias=has_bias, width=site.width, acts=acts)
        fill(experts, source, found, generator, drop)
        put_experts(model, site, experts)
        steps.append(_step(source, target, options, found, experts, _changes(source, options, acts, drop)))
    for config in configs.values():
        first = source_of(model, config, sources)
        write_experts(config, target, options, first, acts=acts, layers=layers, bias=any(bias))
    give_dense_configs(model, sources[0].name if is_elementwise(sources[0].name) else "gelu")
    watch(model)
    watch_context(model)
    check_comes_back(model)
    plan = Plan(
        target=target, steps=tuple(steps), parameters_before=total,
        parameters_after=sum(parameter.numel() for parameter in model.parameters()),
        bytes_per_parameter=next(model.parameters()).element_size(),
    )  # fmt: skip
    differences = comparison.finish(plan.promise)[0] if comparison else None
    return Report(
        plan=plan, sites=tuple(SiteReport(step=step, relative_error=None) for step in steps), differences=differences
    )


def source_of(model: Any, config: Any, sources: list[Source]) -> Source:
    """Return the first FFN that a config governs."""
    return next(s for s in sources if any(config is each for each in governing_configs(model, s.site)))


def expert_routes(
    model: Any, target: str, options: ExpertOptions, *, layers: Any, exclude: str | None
) -> tuple[list[Source], list[list[Route]]]:
    """Return the chosen FFNs, and how each expert is made of each; nothing is changed, and no weight is read.

    Raises:
        HfGluError: an expert that can't be made, or no FFN to make any of.
    """
    sites = [site for site, _ in chosen_sites(model, {"all": target}, layers, exclude)]
    check_alone(model, sites)
    sources = [read_source(model, site) for site in sites]
    check_memory(sources, options)
    return sources, [[_route(source, group) for group in (*options.experts, *options.always_on)] for source in sources]


def check_memory(sources: list[Source], options: ExpertOptions) -> None:
    """Raise OptionError where the experts of these FFNs can't be held by this machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    weights = [source.rows.numel() * source.rows.element_size() for source in sources if on_cpu(source.rows)]
    needed = options.count * sum(weights)
    if needed > memory:
        raise OptionError(
            f"{options.count:,} experts in {len(sources)} FFNs take more than {needed / 1e9:,.0f} GB, and this machine "
            f"has {memory / 1e9:,.0f} GB of memory"
        )


def on_cpu(tensor: Tensor) -> bool:
    """Tell whether a tensor is in the machine's own memory, or is to be."""
    return tensor.device.type in ("cpu", "meta")


def _route(source: Source, group: Group) -> Route:
    """Return how an expert of ``group`` is made of the FFN.

    Raises:
        ConversionError: it can't be.
    """
    entry = registry.find(group.name)
    learnable = entry is not None and LEARNABLE in entry.flags
    if not is_gated(group.name):
        if source.gated:
            raise ConversionError(f"{source.site.name} is gated: the plain expert {group.name} would drop its gate")
        same = learnable or same_function(source.name, unwrapped(group.name))
    elif not source.gated:
        return mix_route(source.name, gated=True) if learnable else find_route(source.name, group.name)
    else:
        assert entry is not None
        same = learnable or (entry.gate is not None and same_function(source.name, unwrapped(entry.gate)))
    return COPY if same else OTHER


def _mix(sources: list[str], options: ExpertOptions, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the options of learnable experts: the FFNs' activations, the given ones, and what each is annealed to."""
    names = {group.name for group in (*options.experts, *options.always_on)}
    learnable = sorted(name for name in names if (found := registry.find(name)) and LEARNABLE in found.flags)
    return mix_options(sources, learnable, given) if learnable else None


def _changes(source: Source, options: ExpertOptions, acts: GluConfig, drop: float) -> list[str]:
    """Return what keeps the experts together from computing what the FFN did."""
    notes = {
        f"{drop:.0%} of each expert's units are initialised anew": drop > 0,
        "narrower experts keep the units of the largest weights": any(
            group.width and group.width < source.width for group in options.experts
        ),
        f"weights=ones adds {options.top_k} experts up": options.weights == "ones" and options.top_k > 1,
    }
    return [*(note for note, holds in notes.items() if holds), *awake_notes(flags_of(options), acts)]


def _step(
    source: Source, target: str, options: ExpertOptions, routes: list[Route], experts: ExpertFFN, changes: list[str]
) -> Step:
    site = source.site
    promise = weakest(*(route.promise for route in routes), *([APPROXIMATE] if changes else []))
    notes = [*dict.fromkeys(route.note for route in routes if route.note), *changes]
    name = f"upcycled to {options.groups}, top {options.top_k}"
    return Step(
        site=site, source=source.name, target=target, route=Route(name=name, promise=promise, note="; ".join(notes)),
        width_before=source.width, width=source.width, iso=False, unbiased=False,
        parameters_before=source.parameters,
        parameters_after=sum(parameter.numel() for parameter in experts.parameters()),
        active_after=active_parameters(experts),
    )  # fmt: skip


def check_alone(model: nn.Module, chosen: list[Site]) -> None:
    """Raise ConversionError where other FFNs are converted already: a config can't say both."""
    names = {site.name for site in chosen}
    other = next((site for site in find_sites(model) if site.activation and site.name not in names), None)
    if other is not None:
        raise ConversionError(f"{other.name} is converted to {other.activation}: experts and others can't be mixed")


def write_experts(
    config: Any, target: str, options: ExpertOptions, first: Source, *, acts: GluConfig, layers: Any, bias: bool
) -> None:
    """Write into a config that the chosen layers have experts.

    Args:
        config: of the model.
        target: for its activation field, a name that stock Transformers doesn't know.
        options: the experts.
        first: the FFN that the first site had.
        acts: options of the experts' activations.
        layers: those with experts; None: all.
        bias: whether the experts have biases.
    """
    old = GluConfig.of(config)
    written = GluConfig(
        activation=None if activation_field(config) else target,
        dense_act=old.dense_act or (first.name if is_elementwise(first.name) else None),
        bias=True if bias and first.bias is None else old.bias,
        layers=layers,
        mix=acts.mix,
        sections=acts.sections,
        width=old.width,
        experts=options.to_dict(),
    )
    write_activation(config, target)
    config.hf_glu = written.to_dict()
