"""A conversion as data: rows, each a site and the change that is made there, and what they cost.

A new way to convert is a new `Change`: a frozen dataclass of what the user may choose, which says what it plans for a
site and does it. The engine finds the rest: sites, loading, calibration data, comparison, report, and undoing it all
where something fails.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from hf_glu.activation import registry
from hf_glu.config.registry import GATED
from hf_glu.config.showing import Shown, ShownTable, change
from hf_glu.conversion.checks import chosen_sites
from hf_glu.conversion.fit.fitting import Fit
from hf_glu.conversion.forms import ConfigEntry, Form, form_of
from hf_glu.conversion.routes import NO_CHANGE, Route, weakest
from hf_glu.conversion.work import TensorRule, Work
from hf_glu.errors import DuplicateNameError, OptionError
from hf_glu.ffn.sites import Site, convertible_sites

Target = str | Mapping[str, str]
COLUMNS = ("site", "from", "to", "route", "promise", "#width", "#parameters")
CHANGES: dict[str, type[Change]] = {}  # every way to convert, by name


class Change:
    """One way to convert. Subclasses are frozen dataclasses; each is in `CHANGES` under its class's name.

    `plan` and `apply` are all that one needs; what the others do by default is right for a change in place that a
    config needn't know of.

    Attributes:
        name: the class's name in snake_case.
        target: what plans and reports say that it converts to.
        of_all: whether it is of all sites or none, so that it takes no ``layers`` and ``exclude``.
        replaces: whether something else than an FFN is in the site's place afterwards.
        rewrites: whether weights are made anew, for which the model must be whole: not quantized, wrapped or sharded.
        reads_text: whether the perplexity of a causal language model is measured on held-out calibration texts.
        foresees: whether `entries` itself sees to it that the model will load as it is converted.
    """

    name: ClassVar[str]
    target: Any = None
    of_all: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    rewrites: ClassVar[bool] = True
    reads_text: ClassVar[bool] = False
    foresees: ClassVar[bool] = False

    def __init_subclass__(cls, *, abstract: bool = False) -> None:
        if abstract:
            return
        cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
        known = CHANGES.setdefault(cls.name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise DuplicateNameError(f"the change {cls.name!r} is registered already, by {known.__module__}")

    def every(self, model: nn.Module) -> list[Site]:
        """Return all sites that it could be made at."""
        return convertible_sites(model)

    def choose(self, model: nn.Module, layers: Any, exclude: str | None) -> list[Site]:
        """Return the sites of the chosen layers; raise HfGluError where there are none."""
        return chosen_sites(model, layers, exclude)

    def form(self, model: nn.Module, site: Site) -> Form:
        """Return what is at a site now: where it is another by the time of `Plan.apply`, that raises."""
        return form_of(model, site)

    def plan(self, model: nn.Module, site: Site) -> Step:
        """Return the row of one site: its route with what that promises, parameters, and so FLOPs and bytes.

        Raises:
            HfGluError: it can't be done there.
        """
        raise NotImplementedError(f"{type(self).__name__} plans nothing")

    def rows(self, model: nn.Module, sites: list[Site]) -> tuple[Step, ...]:
        """Return the rows of all chosen sites."""
        return tuple(self.plan(model, site) for site in sites)

    def added(self, model: nn.Module, steps: tuple[Step, ...]) -> int:
        """Return how many parameters the model gets outside of the sites."""
        return 0

    def needs_calibration(self, step: Step) -> bool:
        """Return whether a row can't be carried out without calibration data."""
        return False

    def check_calibration(self, steps: tuple[Step, ...], given: bool) -> None:
        """Raise OptionError where calibration data are missing, or useless."""
        if not given and any(self.needs_calibration(step) for step in steps):
            raise OptionError(f"{self.name} needs calibration= to be fitted on: texts or tensors")

    def entries(self, model: nn.Module, planned: Rows) -> list[ConfigEntry]:
        """Return what the configs are to say afterwards; raise where they can't."""
        return []

    def apply(self, work: Work, step: Step) -> Fit | None:
        """Convert one site, in place; parameters are replaced, never written into. Return how well it was fitted."""
        raise NotImplementedError(f"{type(self).__name__} does nothing")

    def finish(self, model: nn.Module, planned: Rows) -> None:
        """Do what is left to do in the whole model, after all sites."""

    def without_modules(self) -> Change:
        """Return what it says, without modules of a model: reports are kept longer than models."""
        return self

    def tensors(self, step: Step) -> list[TensorRule] | None:
        """Return what becomes of the site's stored tensors; None: it takes a model."""
        return None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Step(Shown):
    """One row of a plan: what happens to one site.

    Attributes:
        site: the site.
        change: what is done there.
        source: its activation now.
        target: the one that it gets.
        route: how it is converted.
        width_before, width: hidden units.
        parameters_before, parameters_after: of the site.
        iso: whether the width is the one of equal parameters.
        unbiased: whether up is to be fitted in place of a constant, for which there is no bias.
        active_after, active_before: of the parameters, what a token uses; None: all.
        biased: whether an in-projection without a bias gets one that its route doesn't need, for others that do: a
            config says it of all of them.
    """

    site: Site
    change: Change
    source: str
    target: str
    route: Route
    width_before: int
    width: int
    parameters_before: int
    parameters_after: int
    iso: bool = False
    unbiased: bool = False
    active_after: int | None = None
    active_before: int | None = None
    biased: bool = False

    @classmethod
    def at(cls, site: Site, change: Change, source: str, target: str, route: Route, **more: Any) -> Step:
        """Return the row of a change that leaves width and parameters as they are, but for what ``more`` says."""
        same = {"width_before": site.width, "width": site.width}
        same |= {"parameters_before": site.parameters, "parameters_after": site.parameters}
        return cls(site=site, change=change, source=source, target=target, route=route, **{**same, **more})

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
        return replace(self, site=self.site.without_modules(), change=self.change.without_modules())

    def _table(self) -> ShownTable:
        return ShownTable(title=f"1 FFN to {self.target}", columns=COLUMNS, rows=[self.row()])

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
            "change": self.change.name,
            "route": self.route.name,
            "promise": self.route.promise,
            "note": self.route.note,
            "width_before": self.width_before,
            "width_after": self.width,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "active_parameters_after": self.active,
            # a multiplication and an addition for each weight and token
            "flops_per_token_before": 2 * (self.active_before or self.parameters_before),
            "flops_per_token_after": 2 * self.active,
        }


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Rows(Shown):
    """The rows of a conversion to ``target``, with what they cost.

    Attributes:
        target: the activation, or a mapping from selections of layers to them; or the experts.
        steps: one for each chosen site.
        parameters_before, parameters_after: of the whole model.
        bytes_per_parameter: of the FFN weights' dtype.
    """

    target: Target
    steps: tuple[Step, ...]
    parameters_before: int
    parameters_after: int
    bytes_per_parameter: int

    @property
    def promise(self) -> str:
        """The weakest promise among the steps."""
        return weakest(*(step.route.promise for step in self.steps))

    @property
    def changes(self) -> bool:
        """Whether anything would change."""
        return any(step.changes for step in self.steps)

    def without_modules(self) -> Rows:
        """Return what it says, without the modules that it says it of."""
        return Rows(
            target=self.target, steps=tuple(step.without_modules() for step in self.steps),
            parameters_before=self.parameters_before, parameters_after=self.parameters_after,
            bytes_per_parameter=self.bytes_per_parameter,
        )  # fmt: skip

    def _table(self) -> ShownTable:
        title = f"Plan: {len(self.steps)} FFNs ({self.promise if self.steps else 'none'})"
        return ShownTable(title=title, columns=COLUMNS, rows=[step.row() for step in self.steps], notes=(self.cost,))

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
            "flops_per_token_before": 2 * sum(step.active_before or step.parameters_before for step in self.steps),
            "flops_per_token_after": 2 * active,
            "memory_bytes_before": self.parameters_before * self.bytes_per_parameter,
            "memory_bytes_after": self.parameters_after * self.bytes_per_parameter,
            "sites": [step.to_dict() for step in self.steps],
        }
