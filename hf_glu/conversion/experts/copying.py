"""Experts as copies of FFNs: rows, biases and out-projection of one in each, by the routes to their activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from hf_glu.activation import registry
from hf_glu.activation.learnable import LearnableMix
from hf_glu.activation.module import innermost
from hf_glu.conversion.forms import has_bias
from hf_glu.conversion.routes import Route
from hf_glu.conversion.steps import Step
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.build import native_gate
from hf_glu.ffn.expert_sites import own_module
from hf_glu.ffn.experts import ExpertFFN
from hf_glu.ffn.experts.group import Bank, banks_of, is_gated
from hf_glu.ffn.forward import does_more, projections
from hf_glu.ffn.identify import source_activation
from hf_glu.ffn.linear import AnyLinear, weight_rows
from hf_glu.ffn.sites import Site


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """The FFN that experts are copied from.

    Attributes:
        site: where it is.
        name: its activation, or that of its gate.
        gated: whether it is ``[gate | up]``.
        width: W.
        biased: whether its in-projection has a bias, or one of the two.
    """

    site: Site
    name: str
    gated: bool
    width: int
    biased: bool

    @property
    def rows(self) -> Tensor:
        """The rows of its in-projection: ``[W or 2 W, H]``."""
        return torch.cat([weight_rows(part) for part in self._ins])

    @property
    def bias(self) -> Tensor | None:
        """Its bias, ``[W or 2 W]``."""
        if not self.biased:
            return None
        return torch.cat([part.bias if part.bias is not None else weight_rows(part).new_zeros(len(weight_rows(part)))
                          for part in self._ins])  # fmt: skip

    @property
    def wholly_biased(self) -> bool:
        """Whether gate and up have a bias, each."""
        return all(part.bias is not None for part in self._ins)

    @property
    def _ins(self) -> list[AnyLinear]:
        return projections(self.site)[:-1]

    @property
    def bytes(self) -> int:
        """What its in-projection takes in the machine's own memory, or is to."""
        return sum(
            part.weight.numel() * part.weight.element_size()
            for part in self._ins
            if part.weight.device.type in ("cpu", "meta")
        )


def read_source(model: nn.Module, site: Site) -> Source:
    """Return the FFN at a site; raise ConversionError where it is a bank of experts."""
    if site.kind == "mixer":
        raise ConversionError(f"{site.name} is the gate of a mixer: there is no FFN to make experts of")
    if site.kind == "experts":
        raise ConversionError(f"{site.name} is a bank of experts already: convert(model, NAME) changes their gates")
    _check_alone(site)
    name, gated = source_activation(model, site), site.widened or site.native
    if site.widened:
        name = str(registry[name].gate or name)
    biased = any(part.bias is not None for part in projections(site)[:-1])
    return Source(site=site, name=name, gated=gated, width=site.width, biased=biased)


def source_after(step: Step) -> Source:
    """Return what a dense or gated FFN will be after a step that gates it."""
    name = native_gate(step.target) if step.site.native else step.target
    biased = has_bias(step.site) or step.adds_bias
    gate = str(registry[name].gate or name) if step.gated and not step.site.native else name
    return Source(site=step.site, name=gate, gated=True, width=step.width, biased=biased)


def _check_alone(site: Site) -> None:
    """Raise ConversionError where a module that experts replace does more than its parts (Gemma 3n's sparsity)."""
    if own_module(site) and does_more(site):
        raise ConversionError(
            f"{site.name}: {type(site.anchor).__name__} does more than out(act(in(x))), experts don't"
        )


@torch.no_grad()
def fill(
    experts: ExpertFFN, sources: Sequence[Source], routes: list[Route], generator: torch.Generator, drop: float
) -> None:
    """Copy an FFN into every expert; shared experts start at an output of 0.

    Args:
        experts: fresh ones.
        sources: the FFN of each routed expert, in their order; one: that of all. Shared experts get the first.
        routes: of each group of experts, the shared ones last.
        generator, drop: see `_drop`.
    """
    routed, shared = banks_of(experts.banks), banks_of(experts.shared)
    every = list(sources) if len(sources) > 1 else [sources[0]] * experts.options.count
    starts = [*accumulate((bank.count for bank in routed), initial=0)]
    owners = [every[start : start + bank.count] for start, bank in zip(starts, routed, strict=False)]
    owners += [[sources[0]] * bank.count for bank in shared]
    for bank, route, own in zip((*routed, *shared), routes, owners, strict=True):
        _fill_bank(bank, own, route)
        if bank in shared:
            bank.out_proj.zero_()
            if bank.out_bias is not None:
                bank.out_bias.zero_()
        _drop(bank, drop, generator)


def _fill_bank(bank: Bank, owners: list[Source], route: Route) -> None:
    """Copy to each expert of a group its FFN."""
    copied = {id(source): _copied(source, bank, route) for source in owners}
    for expert, source in enumerate(owners):
        rows, bias, out = copied[id(source)]
        bank.in_proj[expert] = rows
        bank.out_proj[expert] = out
        if bank.in_bias is not None and bank.out_bias is not None:
            bank.in_bias[expert] = 0 if bias is None else bias
            old = source.site.out_proj.bias
            bank.out_bias[expert] = 0 if old is None else old
    for number, act in enumerate(bank.acts):  # one for all, or one for each
        start_at(act, owners[number])


def start_at(act: nn.Module, source: Source) -> None:
    """Start an expert's activation at the FFN's, whose own parameters (PReLU, xIELU) it gets, too."""
    inner, old = innermost(act)[1], innermost(source.site.act)[1]
    if isinstance(inner, LearnableMix):
        index = inner.names.index(source.name)
        inner.mix.zero_()
        inner.mix[index] = 1
        inner = inner.functions[index]
    if type(inner) is type(old):
        inner.load_state_dict(old.state_dict())


def _kept(source: Source, rows: Tensor, width: int) -> Tensor:
    """Return the units that a narrower expert keeps: those of the largest in- and out-weights."""
    site = source.site
    if width > site.width:
        raise OptionError(f"an expert of width {width} can't be copied from the {site.width} units of {site.name}")
    rows = rows.view(-1, site.width, rows.shape[1])
    size = rows.double().square().sum((0, 2)) * weight_rows(site.out_proj).double().square().sum(0)
    return size.topk(width).indices.sort().values if width < site.width else torch.arange(width, device=rows.device)


def _copied(source: Source, bank: Bank, route: Route) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the expert's in-rows and bias, and the out-projection's rows."""
    site, rows, bias = source.site, source.rows, source.bias
    kept = _kept(source, rows, bank.width)
    halves = torch.cat([kept, kept + site.width]) if source.gated else kept
    rows, bias, out = rows[halves], None if bias is None else bias[halves], weight_rows(site.out_proj)[:, kept]
    if is_gated(bank.name) and not source.gated:
        zero = torch.zeros_like(rows[:, 0]) if bias is None else bias
        return route.widen(rows, bias=False), route.widen(zero, bias=True), out
    return rows, bias, out


def _drop(bank: Bank, share: float, generator: torch.Generator) -> None:
    """Re-initialise a share of each expert's units (Drop-Upcycling, https://arxiv.org/abs/2502.19261)."""
    for expert in range(bank.count) if int(share * bank.width) else ():
        drop_from(bank, expert, share, generator)


def drop_from(bank: Bank, expert: int, share: float, generator: torch.Generator) -> None:
    """Draw a share of the units of one of a bank's experts anew, see `drop_units`."""
    halves = bank.in_proj[expert].view(-1, bank.width, bank.in_proj.shape[2])
    drop_units([*halves], bank.out_proj[expert], share, generator)


def drop_units(halves: list[Tensor], out: Tensor, share: float, generator: torch.Generator) -> None:
    """Draw a share of one expert's units anew, in place, with the mean and the standard deviation that all have.

    Args:
        halves: the rows of its in-projection, ``[W, H]``, or those of gate and up.
        out: its out-projection ``[H, W]``.
        share: of the units.
        generator: of random numbers.
    """
    width = out.shape[1]
    count = int(share * width)
    units = torch.randperm(width, generator=generator)[:count].to(out.device)
    for rows in halves:
        rows[units] = torch.randn(count, rows.shape[1], generator=generator).to(rows) * rows.std() + rows.mean()
    out[:, units] = torch.randn(out.shape[0], count, generator=generator).to(out) * out.std() + out.mean()
