"""Dense FFNs into experts (Sparse Upcycling, https://arxiv.org/abs/2212.05055), each with an activation of its own.

Every expert is a copy of the dense FFN, by the route to its activation. Weights of the experts that a token uses sum to
1, so that the model computes the same as long as all routes are exact, whatever the router says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_glu.activation import registry
from hf_glu.activation.learnable import mix_options
from hf_glu.activation.stock import is_elementwise, same_function
from hf_glu.config.experts import ExpertOptions, Group, read_groups, write_groups
from hf_glu.config.registry import LEARNABLE, unwrapped
from hf_glu.conversion.experts.copying import Source, fill, read_source, source_after
from hf_glu.conversion.experts.replacing import ExpertChange
from hf_glu.conversion.fit.fitting import Fit
from hf_glu.conversion.routes import APPROXIMATE, EXACT, Route, find_route, mix_route, weakest
from hf_glu.conversion.steps import Rows, Step
from hf_glu.conversion.work import Work
from hf_glu.conversion.wrappers import (
    Sections,
    awake_notes,
    read_options,
    wrapper_parameters,
)
from hf_glu.errors import ConversionError, OptionError, UnknownNameError, nearest
from hf_glu.ffn.context_sites import Flagged, check_kinds, place_parts
from hf_glu.ffn.expert_sites import put_experts
from hf_glu.ffn.experts.group import check_shared, flags_of, is_gated
from hf_glu.ffn.sites import Site

COPY = Route(name="copy", promise=EXACT)
OTHER_NOTE = "the function changes: learnable_ names are exact"
OTHER = Route(name="copy, other activation", promise=APPROXIMATE, note=OTHER_NOTE)


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
    check_shared(experts)
    return experts


@dataclass(frozen=True, kw_only=True)
class Upcycle(ExpertChange):
    """Make experts of FFNs, each a copy.

    Attributes:
        target: for the config's field, a name that stock Transformers doesn't know.
        drop: share of each expert's units to initialise anew.
        mix: as given, of learnable experts.
        first: what the FFNs will be, where another change goes before this one; None: what they are.
    """

    target: str
    drop: float = 0.0
    mix: Mapping[str, Any] | None = None
    first: Rows | None = None

    @classmethod
    def of(
        cls, target: str, experts: str | int | ExpertOptions, top_k: int | None, *, drop: float,
        mix: Mapping[str, Any] | None, sections: Sections,
    ) -> Upcycle:  # fmt: skip
        """Return the change as users write it; raise HfGluError where it can't be read."""
        options = expert_options(experts, target, top_k)
        if not 0 <= drop < 1:
            raise OptionError(f"drop must be a share of the units, 0 up to 1, got {drop}")
        names = [group.name for group in (*options.experts, *options.always_on)]
        acts = read_options(names, None, sections)
        return cls(target=target, options=options, drop=drop, mix=mix, acts=acts)

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups of experts, the shared ones last."""
        return (*self.options.experts, *self.options.always_on)

    def without_modules(self) -> Upcycle:
        return replace(self, first=None)

    def after(self, first: Rows) -> Upcycle:
        """Return the change for FFNs that another one goes before."""
        return replace(self, first=first)

    def rows(self, model: nn.Module, sites: list[Site]) -> tuple[Step, ...]:
        """Return the rows of all FFNs, whose experts share one entry of the config.

        Raises:
            HfGluError: an expert that can't be made.
        """
        sources = self.read(model, sites)
        if self.first is not None:
            sources = [source_after(step) for step in self.first.steps]
        check_memory(sources, self.options)
        routes = [self._routes(source) for source in sources]
        names = [group.name for group in self.groups]
        mix = _mix([source.name for source in sources], self.options, self.mix)
        acts = read_options(names, mix, self.acts.sections)
        bias = any(source.biased or source.site.out_proj.bias is not None for source in sources)
        bias = bias or any(route.up_bias for found in routes for route in found)
        change = replace(self, acts=acts, bias=bias)
        check_kinds(model, self._flagged(sites), acts)
        return tuple(change._row(source, found) for source, found in zip(sources, routes, strict=True))

    def _routes(self, source: Source) -> list[Route]:
        """Return how each group of experts is made of an FFN."""
        return [_route(source, group) for group in self.groups]

    def _row(self, source: Source, routes: list[Route]) -> Step:
        changes = self._changes(source)
        promise = weakest(*(route.promise for route in routes), *([APPROXIMATE] if changes else []))
        notes = [*dict.fromkeys(route.note for route in routes if route.note), *changes]
        name = f"upcycled to {self.options.groups}, top {self.options.top_k}"
        route = Route(name=name, promise=promise, note="; ".join(notes))
        before = {step.site.name: step.parameters_after for step in self.first.steps} if self.first else {}
        size = before.get(source.site.name, source.site.parameters)
        return self.row(source, self.target, route, width=source.width, parameters_before=size)

    def _changes(self, source: Source) -> list[str]:
        """Return what keeps the experts together from computing what the FFN did."""
        options = self.options
        notes = {
            f"{self.drop:.0%} of each expert's units are initialised anew": self.drop > 0,
            "narrower experts keep the units of the largest weights": any(
                group.width and group.width < source.width for group in options.experts
            ),
            f"weights=ones adds {options.top_k} experts up": options.weights == "ones" and options.top_k > 1,
        }
        return [*(note for note, holds in notes.items() if holds), *awake_notes(flags_of(options), self.acts)]

    def _flagged(self, sites: list[Site]) -> Flagged:
        return [(site, flags_of(self.options)) for site in sites]

    def added(self, model: nn.Module, steps: tuple[Step, ...]) -> int:
        return wrapper_parameters(model, self._flagged([step.site for step in steps]), self.acts)

    def apply(self, work: Work, step: Step) -> Fit | None:
        source = read_source(work.model, step.site)
        place_parts(work.model, self._flagged([step.site]), self.acts)
        experts = self.make(source, width=source.width)
        fill(experts, [source], self._routes(source), work.generator, self.drop)
        put_experts(work.model, step.site, experts)
        return None


def check_memory(sources: list[Source], options: ExpertOptions) -> None:
    """Raise OptionError where the experts of these FFNs can't be held by this machine's memory."""
    needed = options.count * sum(source.bytes for source in sources)
    check_bytes(needed, f"{options.count:,} experts in {len(sources)} FFNs")


def check_bytes(needed: int, what: str) -> None:
    """Raise OptionError where so many bytes are more than this machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise OptionError(
            f"{what} take more than {needed / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB of memory"
        )


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
