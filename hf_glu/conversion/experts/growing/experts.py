"""Experts made of experts: each becomes several copies, and the model computes the same (Expert Upcycling).

Paper: https://arxiv.org/abs/2604.19835. Where one copy of each chosen expert computes a token (``one``), the router
stays and chooses as it did; a second one chooses the copy (`hf_glu.ffn.experts.copies`): the same FLOPs. Where ``all``
do, the router's rows are there m times as the experts are, and m times as many are taken, each with an m-th of the
weight: m times the FLOPs, and a family's own layout, which loads without hf_glu.

Copies become different by the tokens that they see, which a random second router sees to; with ``all`` they see the
same tokens, and stay alike in training but for ``drop``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_glu.config.registry import hears
from hf_glu.conversion.checks import chosen_sites
from hf_glu.conversion.engine import make_plan
from hf_glu.conversion.experts.growing import banks, ours
from hf_glu.conversion.experts.growing.growth import Growth
from hf_glu.conversion.experts.growing.utility import utilities
from hf_glu.conversion.experts.upcycling import check_bytes
from hf_glu.conversion.fit.fitting import Fit
from hf_glu.conversion.forms import ConfigEntry, Form
from hf_glu.conversion.report import Report
from hf_glu.conversion.steps import Rows, Step
from hf_glu.conversion.work import Work
from hf_glu.errors import ConversionError, NoSiteError, OptionError
from hf_glu.ffn.expert_sites import own_sites
from hf_glu.ffn.experts import ExpertFFN
from hf_glu.ffn.sites import Site, find_banks


def grow_experts(
    model: Any, times: int = 2, *, calibration: Any = None, tokenizer: Any = None, active: str = "one",
    drop: float = 0.0, **how: Any,
) -> Report:  # fmt: skip
    """Make ``times`` copies of each expert, in place; the model computes the same, and goes on to be trained.

    ``hf_glu.plan(model, hf_glu.conversion.Grow(times=2))`` says beforehand what that would be.

    Args:
        model: a Transformers model with experts: its family's own (Mixtral, Qwen-MoE, OLMoE, DeepSeek) or ours.
        times: m. E experts become m E.
        calibration, tokenizer: texts or token ids, as in `hf_glu.convert`: a language model's experts get copies by
            their utility (`hf_glu.conversion.experts.growing.utility`), m on the mean, each one at least; None: m each.
        active: ``one`` copy of each chosen expert computes a token, whatever its number; or ``all`` of them do.
        drop: share of the units of each copy but an expert's first to initialise anew, by which the function changes.
        how: ``inputs`` and ``check``, as in `hf_glu.convert`.

    Raises:
        OptionError: an option out of range, or that doesn't go with another.
        NoSiteError: the model has no experts.
        ConversionError: they have copies already; weights on several devices; a router of another kind.
    """
    planned = make_plan(model, Grow(times=times, active=active, drop=drop))
    return planned.apply(calibration=calibration, tokenizer=tokenizer, **how)


@dataclass(frozen=True, kw_only=True)
class Grow(Growth):
    """Make copies of experts, of a family's own or of ours."""

    def every(self, model: nn.Module) -> list[Site]:
        return [*own_sites(model), *find_banks(model)]

    def choose(self, model: nn.Module, layers: Any, exclude: str | None) -> list[Site]:
        if not (found := self.every(model)):
            chosen_sites(model, None, None)  # which says where there is no FFN, either
            raise NoSiteError(
                f"{type(model).__name__} has no experts to grow: hf_glu.convert(model, NAME, experts=...) makes some"
            )
        return found

    def form(self, model: nn.Module, site: Site) -> Form:
        layer: Any = site.anchor
        experts = str(layer.options.to_dict()) if _is_ours(site) else banks.form(site)
        return Form(activation=experts, width=site.width, widened=True, bias=False)

    def without_modules(self) -> Grow:
        return replace(self, like=None)

    def rows(self, model: nn.Module, sites: list[Site]) -> tuple[Step, ...]:
        """Return the rows of all layers with experts, which grow together: a config says it of all.

        Raises:
            ConversionError, OptionError: they can't.
        """
        devices = sorted({str(parameter.device) for parameter in model.parameters()})
        if len(devices) > 1:
            raise ConversionError(f"the weights are spread over {', '.join(devices)}: load the model on one device")
        kinds = {_is_ours(site) for site in sites}
        if len(kinds) > 1:
            raise ConversionError(f"{type(model).__name__} has experts of ours and of its family's: grow none of them")
        if devices[0] in ("cpu", "meta"):
            stored = sum(part.nbytes for site in sites for part in site.anchor.parameters())
            check_bytes(self.times * stored, f"{self.times:,} copies of each expert in {len(sites)} layers")
        of_ours = kinds.pop()
        if self.active == "all":
            _check_hearing(sites)
        if of_ours:
            return ours.rows(self, model, sites)
        if self.active == "one":
            return banks.rows_of_one(self, model, sites)
        return banks.rows_of_all(self, model, sites)

    def added(self, model: nn.Module, steps: tuple[Step, ...]) -> int:
        return banks.added(self, model, steps) if self.like is not None else 0

    def check_calibration(self, steps: tuple[Step, ...], given: bool) -> None:
        """Raise OptionError where there is nothing for calibration data to tell."""
        if given and self.active == "all":
            raise OptionError("active='all' makes as many copies of each expert: leave calibration out")

    def entries(self, model: nn.Module, planned: Rows) -> list[ConfigEntry]:
        sites = [step.site for step in planned.steps]
        if _is_ours(sites[0]):
            return ours.entries(self, model, sites)
        return banks.entries(self, model, sites)

    @torch.no_grad()
    def apply(self, work: Work, step: Step) -> Fit | None:
        """Grow the experts of one layer."""
        if work.batches is not None and not work.utilities:
            work.utilities = utilities(work.model, work.sites, work.batches)
        useful = work.utilities.get(step.site.name)
        if _is_ours(step.site):
            ours.apply(self, work, step, useful)
        elif self.active == "one":
            banks.apply_one(self, work, step, useful)
        else:
            banks.apply_all(self, work, step)
        return None

    def finish(self, model: nn.Module, planned: Rows) -> None:
        """Let all of the model know how many experts there are now."""
        if self.like is not None:
            banks.follow(model, self.like, self.times)
        elif _is_ours(planned.steps[0].site):
            ours.finish(model)


def _is_ours(site: Site) -> bool:
    return isinstance(site.anchor, ExpertFFN)


def _check_hearing(sites: list[Site]) -> None:
    """Raise ConversionError where gates hear the router (``kappa_``), whose weight several copies would share."""
    for site in sites:
        layer: Any = site.anchor
        if any(hears(group.name) for group in getattr(layer, "groups", ())):
            raise ConversionError(
                f"{site.name}: with active='all' each copy gets a part of its expert's weight, which "
                "kappa_ gates hear: active='one' leaves it whole"
            )
