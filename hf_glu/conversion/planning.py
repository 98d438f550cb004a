"""What a conversion would do, before it does it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_glu.activation import registry
from hf_glu.activation.elementwise import same_function
from hf_glu.config import GluConfig
from hf_glu.conversion.guard import check_convertible
from hf_glu.conversion.routes import APPROXIMATE, EXACT, ROUNDING, Route, find_route
from hf_glu.errors import ConversionError, NoSiteError, OptionError
from hf_glu.layers.build import check_selection, native_gate
from hf_glu.layers.sites import Site, find_sites
from hf_glu.layers.source import source_activation
from hf_glu.selection import check_layers, selected

NO_CHANGE = Route(name="none", promise=EXACT, note="it has this activation already")


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What happens to one site.

    Attributes:
        site: the site.
        source: its activation now.
        route: how it is converted.
        parameters_before, parameters_after: of the site.
    """

    site: Site
    source: str
    route: Route
    parameters_before: int
    parameters_after: int

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


def plan(model: Any, target: str, *, layers: Any = None, exclude: str | None = None) -> Plan:
    """Plan the conversion of ``model``'s FFNs to the gated activation ``target``; nothing is changed.

    Args:
        model: a Transformers model of any head.
        target: a gated name, see `hf_glu.activations`.
        layers: which layers (see `hf_glu.selection`); None: all.
        exclude: regular expression; sites whose name it finds are left alone.

    Raises:
        UnknownNameError: unknown target.
        NoSiteError: no FFN site, or none chosen.
        ConversionError: no route, converted to something else already, or a model that can't be converted as it is.
    """
    registry[target]
    check_convertible(model)
    sites = chosen_sites(model, layers, exclude)
    steps = tuple(_step(model, site, target) for site in sites)
    total = sum(parameter.numel() for parameter in model.parameters())
    added = sum(step.parameters_after - step.parameters_before for step in steps)
    return Plan(
        target=target,
        steps=steps,
        parameters_before=total,
        parameters_after=total + added,
        bytes_per_parameter=next(model.parameters()).element_size(),
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


def _step(model: nn.Module, site: Site, target: str) -> Step:
    source, count = source_activation(model, site), site.parameters
    if site.native:
        return Step(
            site=site, source=source, route=_native_route(source, target), parameters_before=count,
            parameters_after=count,
        )  # fmt: skip
    if site.activation:
        if source != target:
            raise ConversionError(
                f"{site.name} is converted to {source} already: convert the dense checkpoint to {target} instead"
            )
        return Step(site=site, source=source, route=NO_CHANGE, parameters_before=count, parameters_after=count)
    route = find_route(source, target)
    bias = site.in_proj.bias is not None
    added = site.width * site.hidden + site.width * (bias or 2 * bool(route.up_bias))
    return Step(site=site, source=source, route=route, parameters_before=count, parameters_after=count + added)


def _native_route(source: str, target: str) -> Route:
    gate = native_gate(target)
    if same_function(source, gate):
        return NO_CHANGE
    return Route(
        name=f"gate activation {source} -> {gate}",
        promise=APPROXIMATE,
        note="natively gated: the function changes, fine-tune it",
    )
