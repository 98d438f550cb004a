"""What a conversion would do, before it does it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_glu.activation import registry
from hf_glu.activation.elementwise import same_function
from hf_glu.activation.learnable import PREFIX, mix_functions
from hf_glu.config import GluConfig, check_width
from hf_glu.conversion.guard import check_convertible
from hf_glu.errors import ConversionError, NoSiteError, OptionError
from hf_glu.layers.build import check_selection, gated_width, native_gate
from hf_glu.layers.linear import out_features
from hf_glu.layers.sites import Site, find_sites
from hf_glu.layers.source import source_activation
from hf_glu.registry import GATED, LEARNABLE
from hf_glu.routes import APPROXIMATE, EXACT, ROUNDING, Route, find_route, mix_route
from hf_glu.selection import check_layers, selected

FITTED = Route(name="up = 1, fitted", promise=APPROXIMATE, up_bias=1.0, note="no route of its own: as good as the fit")
NARROW_NOTE = "the units that add most, fitted to the old output: the error is reported"
NO_CHANGE = Route(name="none", promise=EXACT, note="it has this activation already")


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What happens to one site.

    Attributes:
        site: the site.
        source: its activation now.
        route: how it is converted.
        width_before, width: hidden units.
        iso: whether the width is the one of equal parameters.
        parameters_before, parameters_after: of the site.
    """

    site: Site
    source: str
    route: Route
    width_before: int
    width: int
    iso: bool
    parameters_before: int
    parameters_after: int

    @property
    def narrows(self) -> bool:
        """Whether units are dropped."""
        return self.width < self.width_before

    @property
    def changes(self) -> bool:
        """Whether anything is done."""
        return self.route is not NO_CHANGE

    def to_dict(self) -> dict[str, Any]:
        """Return the step as plain data."""
        return {
            "site": self.site.name,
            "from": self.source,
            "route": self.route.name,
            "promise": self.route.promise,
            "note": self.route.note,
            "width_before": self.width_before,
            "width_after": self.width,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            # a multiplication and an addition for each weight and token
            "flops_per_token_before": 2 * self.parameters_before,
            "flops_per_token_after": 2 * self.parameters_after,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The steps of a conversion to ``target``, with what they cost.

    Attributes:
        target: the gated activation.
        steps: one for each chosen site.
        parameters_before, parameters_after: of the whole model.
        bytes_per_parameter: of the FFN weights' dtype.
    """

    target: str
    steps: tuple[Step, ...]
    parameters_before: int
    parameters_after: int
    bytes_per_parameter: int

    @property
    def promise(self) -> str:
        """The weakest promise among the steps."""
        return max((step.route.promise for step in self.steps), key=(EXACT, ROUNDING, APPROXIMATE).index)

    @property
    def changes(self) -> bool:
        """Whether anything would change."""
        return any(step.changes for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        ffn = [sum(getattr(step, f"parameters_{when}") for step in self.steps) for when in ("before", "after")]
        return {
            "target": self.target,
            "promise": self.promise,
            "changes": self.changes,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "ffn_parameters_before": ffn[0],
            "ffn_parameters_after": ffn[1],
            "flops_per_token_before": 2 * ffn[0],
            "flops_per_token_after": 2 * ffn[1],
            "memory_bytes_before": self.parameters_before * self.bytes_per_parameter,
            "memory_bytes_after": self.parameters_after * self.bytes_per_parameter,
            "sites": [step.to_dict() for step in self.steps],
        }


def plan(
    model: Any,
    target: str,
    *,
    width: int | str = "keep",
    layers: Any = None,
    exclude: str | None = None,
    fitted: bool = False,
) -> Plan:
    """Plan the conversion of ``model``'s FFNs to the gated activation ``target``; nothing is changed.

    Args:
        model: a Transformers model of any head.
        target: a gated name, see `hf_glu.activations`.
        width: hidden units: ``keep``, ``iso`` (as many parameters as the dense FFN has, see `hf_glu.config.iso_width`)
            or a number. FFNs that are gated already are pruned to the number.
        layers: which layers (see `hf_glu.selection`); None: all.
        exclude: regular expression; sites whose name it finds are left alone.
        fitted: whether the FFNs will be fitted to calibration data, so that any activation may become any gate.

    Raises:
        UnknownNameError: unknown target.
        OptionError: a width that can't be.
        NoSiteError: no FFN site, or none chosen.
        ConversionError: no route, converted to something else already, or a model that can't be converted as it is.
    """
    registry[target]
    check_convertible(model)
    sites = chosen_sites(model, layers, exclude)
    check_width(None if width == "keep" else width)
    steps = tuple(_step(model, site, target, width, fitted) for site in sites)
    steps = _with_mixes(steps, target)
    total = sum(parameter.numel() for parameter in model.parameters())
    added = sum(step.parameters_after - step.parameters_before for step in steps)
    return Plan(
        target=target,
        steps=steps,
        parameters_before=total,
        parameters_after=total + added,
        bytes_per_parameter=next(model.parameters()).element_size(),
    )


def _with_mixes(steps: tuple[Step, ...], target: str) -> tuple[Step, ...]:
    """Count the coefficients of learnable mixes, whose dictionary holds the activations of all sites."""
    if LEARNABLE not in registry[target].flags:
        return steps
    count = len(mix_functions([step.source for step in steps if step.changes], target))
    return tuple(
        replace(step, parameters_after=step.parameters_after + count) if step.changes else step for step in steps
    )


def chosen_sites(model: nn.Module, layers: Any, exclude: str | None) -> list[Site]:
    """Return the sites that ``layers`` selects and ``exclude`` doesn't find."""
    sites = find_sites(model)
    if not sites:
        raise NoSiteError(f"{type(model).__name__} has no feed-forward network that hf_glu knows")
    options = GluConfig(layers=check_layers(layers))
    check_selection(sites, options)
    try:
        pattern = re.compile(exclude) if exclude else None
    except re.error as error:
        raise OptionError(f"exclude={exclude!r} is no regular expression: {error}") from None
    chosen = [site for site in sites if selected(options.layers, site.layer, site.stack)]
    chosen = [site for site in chosen if not (pattern and pattern.search(site.name))]
    if not chosen:
        raise NoSiteError(f"none of the {len(sites)} sites is chosen by layers={layers!r}, exclude={exclude!r}")
    return chosen


def _step(model: nn.Module, site: Site, target: str, width: int | str, fitted: bool) -> Step:
    source, before, count = source_activation(model, site), site.width, site.parameters
    after = _target_width(site, width)
    route = _native_route(source, target) if site.native else _route(site, source, target, fitted)
    if after < before:
        units = f"{before} -> {after} units"
        name = units if route is NO_CHANGE else f"{route.name}, {units}"
        route = replace(route, name=name, promise=APPROXIMATE, note=NARROW_NOTE)
    gains = GATED in registry[target].flags and not (site.native or site.widened)
    per_unit = _unit_parameters(site, gated=True, bias=gains and bool(route.up_bias))
    fixed = count - before * _unit_parameters(site, gated=not gains, bias=False)
    return Step(
        site=site, source=source, route=route, width_before=before, width=after, iso=width == "iso",
        parameters_before=count, parameters_after=count if after == before and not gains else fixed + after * per_unit,
    )  # fmt: skip


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
    if site.kind == "experts":
        raise ConversionError(f"{site.name}: the width of a bank of experts can't be changed")
    wanted = gated_width(width, site.width)
    if wanted > site.width:
        raise OptionError(f"width={wanted} is more than the {site.width} hidden units of {site.name}")
    return wanted


def _route(site: Site, source: str, target: str, fitted: bool) -> Route:
    if site.activation:
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


def _native_route(source: str, target: str) -> Route:
    gate = native_gate(target)
    if same_function(source, gate):
        return NO_CHANGE
    if LEARNABLE in registry[target].flags:
        if source.startswith(PREFIX):
            raise ConversionError(f"the gate is {source} already")
        return mix_route(source, gated=False)
    return Route(
        name=f"gate activation {source} -> {gate}",
        promise=APPROXIMATE,
        note="natively gated: the function changes, fine-tune it",
    )
