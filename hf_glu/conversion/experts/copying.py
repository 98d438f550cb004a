"""Experts as copies of a dense FFN: its rows, biases and out-projection in each, by the routes to their activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation import registry
from hf_glu.activation.learnable import LearnableMix
from hf_glu.activation.module import innermost
from hf_glu.conversion.routes import Route
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.expert_sites import own_module
from hf_glu.ffn.experts import ExpertFFN
from hf_glu.ffn.experts.group import Bank, banks_of, is_gated
from hf_glu.ffn.forward import ffn_output
from hf_glu.ffn.identify import source_activation
from hf_glu.ffn.linear import weight_rows
from hf_glu.ffn.sites import Site
from hf_glu.instruments.probe import evaluating

ROWS = 16  # random inputs that a module is compared with its parts on


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


def read_source(model: nn.Module, site: Site) -> Source:
    """Return the FFN at a site; raise ConversionError where it is a bank of experts."""
    if site.kind == "mixer":
        raise ConversionError(f"{site.name} is the gate of a mixer: there is no FFN to make experts of")
    if site.kind == "experts":
        raise ConversionError(f"{site.name} is a bank of experts already: convert(model, NAME) changes their gates")
    _check_alone(site)
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


@torch.no_grad()
def _check_alone(site: Site) -> None:
    """Raise ConversionError where a module that experts replace does more than its parts (Gemma 3n's sparsity)."""
    module = site.anchor
    if not own_module(site) or site.in_proj.weight.device.type == "meta":
        return
    x = torch.randn(1, ROWS, site.hidden, generator=torch.Generator().manual_seed(0)).to(site.in_proj.weight)
    with evaluating(module):
        theirs, ours = module(x), ffn_output(site, x)
    same = isinstance(theirs, Tensor) and theirs.shape == ours.shape
    if not same or not torch.allclose(theirs.float(), ours.float(), rtol=1e-2, atol=1e-2 * float(ours.abs().max())):
        raise ConversionError(f"{site.name}: {type(module).__name__} does more than out(act(in(x))), experts don't")


@torch.no_grad()
def fill(experts: ExpertFFN, source: Source, routes: list[Route], generator: torch.Generator, drop: float) -> None:
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
        for act in bank.acts:
            _start_at(act, source)
        _drop(bank, drop, generator)


def _start_at(act: nn.Module, source: Source) -> None:
    """Start an expert's activation at the FFN's, whose own parameters (PReLU, xIELU) it gets, too."""
    inner, old = innermost(act)[1], innermost(source.site.act)[1]
    if isinstance(inner, LearnableMix):
        index = inner.names.index(source.name)
        inner.mix.zero_()
        inner.mix[index] = 1
        inner = inner.functions[index]
    if type(inner) is type(old):
        inner.load_state_dict(old.state_dict())


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
