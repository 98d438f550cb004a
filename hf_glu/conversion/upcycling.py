"""Dense FFNs into experts (Sparse Upcycling, https://arxiv.org/abs/2212.05055), each with an activation of its own.

Every expert is a copy of the dense FFN, by the route to its activation. Weights of the experts that a token uses sum to
1, so that the model computes the same as long as all routes are exact, whatever the router says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation import GatedActivation, registry
from hf_glu.activation.elementwise import is_elementwise, same_function
from hf_glu.activation.learnable import LearnableMix, mix_options
from hf_glu.config import GluConfig
from hf_glu.context import watch_context
from hf_glu.conversion.entries import selection_of
from hf_glu.conversion.guard import check_convertible, check_values
from hf_glu.conversion.measure import Comparison
from hf_glu.conversion.planning import chosen_sites
from hf_glu.conversion.report import Report, SiteReport
from hf_glu.conversion.steps import Plan, Step
from hf_glu.errors import ConversionError, OptionError, UnknownNameError, nearest
from hf_glu.expert_options import ExpertOptions, Group, read_groups, write_groups
from hf_glu.experts import ExpertFFN
from hf_glu.experts.bank import Bank, is_gated
from hf_glu.experts.ffn import banks_of
from hf_glu.experts.losses import watch
from hf_glu.experts.statistics import active_parameters
from hf_glu.layers.build import give_dense_configs
from hf_glu.layers.expert_sites import make_experts, put_experts
from hf_glu.layers.fields import activation_field, write_activation
from hf_glu.layers.linear import weight_rows
from hf_glu.layers.sites import Site, convertible_sites, find_sites
from hf_glu.layers.source import governing_configs, source_activation
from hf_glu.registry import LEARNABLE, unwrapped
from hf_glu.routes import APPROXIMATE, EXACT, ROUNDING, Route, find_route, mix_route

COPY = Route(name="copy", promise=EXACT)
OTHER_NOTE = "the function changes: learnable_ names are exact"
OTHER = Route(name="copy, other activation", promise=APPROXIMATE, note=OTHER_NOTE)
SEED = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """The FFN that the experts are copied from: its rows ``[W or 2 W, H]``, out-projection and activation."""

    site: Site
    name: str
    gated: bool
    rows: Tensor
    bias: Tensor | None
    width: int
    parameters: int


def expert_options(experts: str | int | ExpertOptions, target: str, top_k: int | None) -> ExpertOptions:
    """Return the options that `hf_glu.convert`'s ``experts`` and ``top_k`` mean.

    Raises:
        OptionError, UnknownNameError: they can't be read, or name no activation.
    """
    if not isinstance(experts, ExpertOptions):
        groups = write_groups(read_groups(str(experts), default=target))
        experts = ExpertOptions(groups=groups, top_k=ExpertOptions.top_k if top_k is None else top_k)
    for group in (*experts.experts, *experts.always_on):
        if unwrapped(group.name) != group.name:
            raise OptionError(f"experts see no sequences, which {group.name} needs: use {unwrapped(group.name)}")
        if registry.find(group.name) is None and not is_elementwise(group.name):
            raise UnknownNameError(
                f"experts have the unknown activation {group.name!r}; {nearest(group.name, [e.name for e in registry])}"
            )
    return experts


def upcycle(
    model: Any, target: str, options: ExpertOptions, *, layers: Any, exclude: str | None, drop: float, inputs: Any,
    check: bool, mix: Mapping[str, Any] | None,
) -> Report:  # fmt: skip
    """Turn the chosen FFNs into experts, in place; see `hf_glu.convert`.

    Raises:
        ConversionError: an FFN that is a bank of experts already, or a group that can't be made of it.
    """
    if not 0 <= drop < 1:
        raise OptionError(f"drop must be a share of the units, 0 up to 1, got {drop}")
    check_convertible(model)
    check_values(model)
    sites = [site for site, _ in chosen_sites(model, {"all": target}, layers, exclude)]
    check_alone(model, sites)
    layers = selection_of(sites, convertible_sites(model))
    sources = [read_source(model, site) for site in sites]
    routes = [[_route(source, group) for group in (*options.experts, *options.always_on)] for source in sources]
    mix = _mix([source.name for source in sources], options, mix)
    total = sum(parameter.numel() for parameter in model.parameters())
    comparison = Comparison(model, [], inputs) if check else None
    bias = [s.bias is not None or any(r.up_bias for r in each) for s, each in zip(sources, routes, strict=True)]
    generator = torch.Generator().manual_seed(SEED)
    steps = []
    configs = {id(config): config for site in sites for config in governing_configs(model, site)}
    for source, found, has_bias in zip(sources, routes, bias, strict=True):
        site = source.site
        experts = make_experts(site, options, bias=has_bias, width=site.width, mix=mix)
        _fill(experts, source, found, generator, drop)
        put_experts(model, site, experts)
        steps.append(_step(source, target, options, found, experts, drop))
    for config in configs.values():
        write_experts(config, target, options, sources[0], mix=mix, layers=layers, bias=any(bias))
    give_dense_configs(model, sources[0].name if is_elementwise(sources[0].name) else "gelu")
    watch(model)
    watch_context(model)
    plan = Plan(
        target=target, steps=tuple(steps), parameters_before=total,
        parameters_after=sum(parameter.numel() for parameter in model.parameters()),
        bytes_per_parameter=next(model.parameters()).element_size(),
    )  # fmt: skip
    differences = comparison.finish()[0] if comparison else None
    return Report(
        plan=plan, sites=tuple(SiteReport(step=step, relative_error=None) for step in steps), differences=differences
    )


def read_source(model: nn.Module, site: Site) -> Source:
    """Return the FFN at a site; raise ConversionError where it is a bank of experts."""
    if site.kind == "mixer":
        raise ConversionError(f"{site.name} is the gate of a mixer: there is no FFN to make experts of")
    if site.kind == "experts":
        raise ConversionError(f"{site.name} is a bank of experts already: convert(model, NAME) changes their gates")
    name = source_activation(model, site)
    size = {"width": site.width, "parameters": site.parameters}
    if site.row.gate is not None:
        gate = site.anchor.get_submodule(site.row.gate)
        rows = torch.cat([weight_rows(gate), weight_rows(site.in_proj)])
        biases: list[Any] = [gate.bias, site.in_proj.bias]
        bias = None if gate.bias is None else torch.cat(biases)
        return Source(site=site, name=name, gated=True, rows=rows, bias=bias, **size)
    if site.widened:
        name = str(registry[name].gate or name)
    gated = site.widened or site.kind == "packed"
    rows = weight_rows(site.in_proj)
    return Source(site=site, name=name, gated=gated, rows=rows, bias=site.in_proj.bias, **size)


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
        same = learnable or same_function(source.name, group.name)
    elif not source.gated:
        return mix_route(source.name, gated=True) if learnable else find_route(source.name, group.name)
    else:
        assert entry is not None
        same = learnable or (entry.gate is not None and same_function(source.name, entry.gate))
    return COPY if same else OTHER


def _mix(sources: list[str], options: ExpertOptions, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the options of learnable experts: the FFNs' activations, the given ones, and what each is annealed to."""
    names = {group.name for group in (*options.experts, *options.always_on)}
    learnable = sorted(name for name in names if (found := registry.find(name)) and LEARNABLE in found.flags)
    return mix_options(sources, learnable, given) if learnable else None


@torch.no_grad()
def _fill(experts: ExpertFFN, source: Source, routes: list[Route], generator: torch.Generator, drop: float) -> None:
    """Copy the FFN into every expert; shared experts start at an output of 0."""
    routed, shared = banks_of(experts.banks), banks_of(experts.shared)
    for bank, route in zip((*routed, *shared), routes, strict=True):
        kept = _kept(source, bank.width)
        rows, bias, out = _copied(source, bank, route, kept)
        bank.in_proj.copy_(rows.expand_as(bank.in_proj))
        bank.out_proj.copy_(out.expand_as(bank.out_proj))
        if bank.in_bias is not None and bank.out_bias is not None:
            bank.in_bias.copy_((torch.zeros_like(rows[:, 0]) if bias is None else bias).expand_as(bank.in_bias))
            old = source.site.out_proj.bias
            bank.out_bias.copy_((torch.zeros_like(out[:, 0]) if old is None else old).expand_as(bank.out_bias))
        if bank in shared:
            bank.out_proj.zero_()
            if bank.out_bias is not None:
                bank.out_bias.zero_()
        inner = bank.act.phi if isinstance(bank.act, GatedActivation) else bank.act
        if isinstance(inner, LearnableMix):
            inner.mix.zero_()
            inner.mix[inner.names.index(source.name)] = 1
        _drop(bank, drop, generator)


def _kept(source: Source, width: int) -> Tensor:
    """Return the units that a narrower expert keeps: those of the largest in- and out-weights."""
    site = source.site
    if width > site.width:
        raise OptionError(f"an expert of width {width} can't be copied from the {site.width} units of {site.name}")
    rows = source.rows.view(-1, site.width, source.rows.shape[1])
    size = rows.double().square().sum((0, 2)) * weight_rows(site.out_proj).double().square().sum(0)
    return size.topk(width).indices.sort().values if width < site.width else torch.arange(width, device=rows.device)


def _copied(source: Source, bank: Bank, route: Route, kept: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the expert's in-rows and bias, and the out-projection's rows."""
    site = source.site
    halves = torch.cat([kept, kept + site.width]) if source.gated else kept
    rows, out = source.rows[halves], weight_rows(site.out_proj)[:, kept]
    bias = None if source.bias is None else source.bias[halves]
    if is_gated(bank.name) and not source.gated:
        zero = torch.zeros_like(rows[:, 0]) if bias is None else bias
        return route.widen(rows, bias=False), route.widen(zero, bias=True), out
    return rows, bias, out


def _drop(bank: Bank, share: float, generator: torch.Generator) -> None:
    """Re-initialise a share of each expert's units (Drop-Upcycling, https://arxiv.org/abs/2502.19261)."""
    count = int(share * bank.width)
    for expert in range(bank.count) if count else ():
        units = torch.randperm(bank.width, generator=generator)[:count].to(bank.in_proj.device)
        for rows in bank.in_proj[expert].view(-1, bank.width, bank.in_proj.shape[2]):
            rows[units] = torch.randn(count, rows.shape[1], generator=generator).to(rows) * rows.std() + rows.mean()
        out = bank.out_proj[expert]
        out[:, units] = torch.randn(out.shape[0], count, generator=generator).to(out) * out.std() + out.mean()


def _step(
    source: Source, target: str, options: ExpertOptions, routes: list[Route], experts: ExpertFFN, drop: float
) -> Step:
    site = source.site
    narrow = any(group.width and group.width < source.width for group in options.experts)
    changed = [APPROXIMATE] if drop or narrow else []
    promise = max([route.promise for route in routes] + changed, key=(EXACT, ROUNDING, APPROXIMATE).index)
    notes = list(dict.fromkeys(route.note for route in routes if route.note))
    if drop:
        notes.append(f"{drop:.0%} of each expert's units are initialised anew")
    if narrow:
        notes.append("narrower experts keep the units of the largest weights")
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
    config: Any, target: str, options: ExpertOptions, first: Source, *, mix: Any, layers: Any, bias: bool
) -> None:
    """Write into a config that the chosen layers have experts.

    Args:
        config: of the model.
        target: for its activation field, a name that stock Transformers doesn't know.
        options: the experts.
        first: the FFN that the first site had.
        mix: of learnable experts.
        layers: those with experts; None: all.
        bias: whether the experts have biases.
    """
    old = GluConfig.of(config)
    written = GluConfig(
        activation=None if activation_field(config) else target,
        dense_act=old.dense_act or (first.name if is_elementwise(first.name) else None),
        bias=True if bias and first.bias is None else old.bias,
        layers=layers,
        mix=mix,
        width=old.width,
        experts=options.to_dict(),
    )
    write_activation(config, target)
    config.hf_glu = written.to_dict()
