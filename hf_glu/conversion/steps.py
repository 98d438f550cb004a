"""A conversion's plan, as data: one step for each site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_glu.activation import registry
from hf_glu.activation.learnable import mix_options
from hf_glu.config.glu import GluConfig
from hf_glu.config.registry import GATED, LEARNABLE, core
from hf_glu.config.showing import Shown, Table, change
from hf_glu.conversion.routes import APPROXIMATE, EXACT, Route, weakest
from hf_glu.ffn.sites import Site

Target = str | Mapping[str, str]
FITTED = Route(name="up = 1, fitted", promise=APPROXIMATE, up_bias=1.0, note="no route of its own: as good as the fit")
COLUMNS = ("site", "from", "to", "route", "promise", "#width", "#parameters")
NO_CHANGE = Route(name="none", promise=EXACT, note="it has this activation already")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Step(Shown):
    """What happens to one site.

    Attributes:
        site: the site.
        source: its activation now.
        target: the one that it gets.
        route: how it is converted.
        width_before, width: hidden units.
        iso: whether the width is the one of equal parameters.
        unbiased: whether up is to be fitted in place of a constant, for which there is no bias.
        parameters_before, parameters_after: of the site.
        active_after: of these, what a token uses; None: all.
        biased: whether an in-projection without a bias gets one that its route doesn't need, for others that do: a
            config says it of all of them.
    """

    site: Site
    source: str
    target: str
    route: Route
    width_before: int
    width: int
    iso: bool
    unbiased: bool
    parameters_before: int
    parameters_after: int
    active_after: int | None = None
    biased: bool = False

    @property
    def adds_bias(self) -> bool:
        """Whether an in-projection without a bias gets one."""
        dense = self.site.kind == "dense" and not self.site.widened and self.gated
        return dense and self.site.in_proj.bias is None and (self.biased or bool(self.route.up_bias))

    @property
    def active(self) -> int:
        """The parameters that a token uses after the conversion."""
        return self.parameters_after if self.active_after is None else self.active_after

    @property
    def narrows(self) -> bool:
        """Whether units are dropped."""
        return self.width < self.width_before

    @property
    def gated(self) -> bool:
        """Whether the target has a gate."""
        return GATED in registry[self.target].flags

    @property
    def needs_fit(self) -> bool:
        """Whether calibration data have to make up for what is missing."""
        return self.narrows or self.unbiased

    @property
    def changes(self) -> bool:
        """Whether anything is done."""
        return self.route is not NO_CHANGE

    def without_modules(self) -> Step:
        """Return what it says, without the modules that it says it of."""
        return replace(self, site=self.site.without_modules())

    def _table(self) -> Table:
        return Table(title=f"1 FFN to {self.target}", columns=COLUMNS, rows=[self.row()])

    def row(self) -> tuple[str, ...]:
        """Return its row of a table with the `COLUMNS`."""
        widths = f"{self.width_before:,} -> {self.width:,}" if self.width != self.width_before else f"{self.width:,}"
        count = f"{self.parameters_before:,} -> {self.parameters_after:,}"
        return self.site.name, self.source, self.target, self.route.name, self.route.promise, widths, count

    def to_dict(self) -> dict[str, Any]:
        """Return the step as plain data."""
        return {
            "site": self.site.name,
            "from": self.source,
            "to": self.target,
            "route": self.route.name,
            "promise": self.route.promise,
            "note": self.route.note,
            "width_before": self.width_before,
            "width_after": self.width,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "active_parameters_after": self.active,
            # a multiplication and an addition for each weight and token
            "flops_per_token_before": 2 * self.parameters_before,
            "flops_per_token_after": 2 * self.active,
        }


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Plan(Shown):
    """The steps of a conversion to ``target``, with what they cost.

    Attributes:
        target: the gated activation, or a mapping from selections of layers to them.
        steps: one for each chosen site.
        parameters_before, parameters_after: of the whole model.
        bytes_per_parameter: of the FFN weights' dtype.
        state: options of stateful activations.
        context: options of modulated ones.
        given: options of learnable and adaptive ones; the functions beside those that the sites need.
    """

    target: Target
    steps: tuple[Step, ...]
    parameters_before: int
    parameters_after: int
    bytes_per_parameter: int
    state: dict[str, Any] | None = None
    context: dict[str, Any] | None = None
    given: dict[str, Any] | None = None

    @property
    def promise(self) -> str:
        """The weakest promise among the steps."""
        return weakest(*(step.route.promise for step in self.steps))

    @property
    def changes(self) -> bool:
        """Whether anything would change."""
        return any(step.changes for step in self.steps)

    @property
    def needs_calibration(self) -> bool:
        """Whether it can't be carried out without calibration data."""
        return any(step.needs_fit or FITTED.name in step.route.name for step in self.steps)

    @property
    def options(self) -> GluConfig:
        """The options of the activations."""
        return GluConfig(mix=self.mix, state=self.state, context=self.context)

    @property
    def mix(self) -> dict[str, Any] | None:
        """What ``config.hf_glu`` says of learnable activations that start at each site's own; None: there are none."""
        return mix_of(self.steps, self.given)

    def without_modules(self) -> Plan:
        """Return what it says, without the modules that it says it of."""
        return replace(self, steps=tuple(step.without_modules() for step in self.steps))

    def _table(self) -> Table:
        title = f"Plan: {len(self.steps)} FFNs ({self.promise if self.steps else 'none'})"
        return Table(title=title, columns=COLUMNS, rows=[step.row() for step in self.steps], notes=(self.cost,))

    @property
    def cost(self) -> str:
        """The model's parameters before and after, as a line."""
        return f"parameters {change(self.parameters_before, self.parameters_after)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        ffn = [sum(getattr(step, f"parameters_{when}") for step in self.steps) for when in ("before", "after")]
        active = sum(step.active for step in self.steps)
        return {
            "target": self.target,
            "promise": self.promise,
            "changes": self.changes,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "active_parameters_after": self.parameters_after - ffn[1] + active,
            "ffn_parameters_before": ffn[0],
            "ffn_parameters_after": ffn[1],
            "flops_per_token_before": 2 * ffn[0],
            "flops_per_token_after": 2 * active,
            "memory_bytes_before": self.parameters_before * self.bytes_per_parameter,
            "memory_bytes_after": self.parameters_after * self.bytes_per_parameter,
            "sites": [step.to_dict() for step in self.steps],
        }


def mix_of(steps: tuple[Step, ...], given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the options of mixes: the functions of all sites, the given ones, and what they are annealed to."""
    steps = tuple(step for step in steps if step.changes)
    learnable = dict.fromkeys(step.target for step in steps if LEARNABLE in registry[step.target].flags)
    if not learnable:
        return None
    return mix_options([core(step.source) for step in steps], learnable, given)
