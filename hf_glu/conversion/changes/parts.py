"""What a gate is made of, at one site and in this order: units dropped, an up half, another activation."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_glu.activation import registry
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.activation.learnable import LearnableMix
from hf_glu.activation.module import innermost
from hf_glu.activation.wrapped import shifts
from hf_glu.config.glu import GluConfig
from hf_glu.config.registry import GATED, core
from hf_glu.conversion.fit.fitting import constant_direction, contributions
from hf_glu.conversion.steps import Step
from hf_glu.conversion.work import TensorRule
from hf_glu.errors import CheckpointError
from hf_glu.ffn.build import configure, native_gate
from hf_glu.ffn.forward import ffn_units, projections
from hf_glu.ffn.linear import set_rows, weight_rows
from hf_glu.ffn.mixers import gate_of, own_gate
from hf_glu.ffn.sites import Site
from hf_glu.instruments.equality import checksum


class GatePart(Protocol):
    """What a gate may take at a site: whether a row needs it, how it is done, and what it is for stored tensors."""

    def needed(self, step: Step) -> bool:
        """Return whether a row takes it."""

    def apply(self, step: Step, acts: GluConfig, x: Tensor | None) -> None:
        """Do it; ``x`` are the site's inputs on calibration data, where there are any."""

    def tensors(self, step: Step) -> list[TensorRule] | None:
        """Return what becomes of stored tensors; None: it takes a model."""


class Narrow:
    """Drop the units that add least to the output on calibration inputs ``x`` ``[tokens, H]``."""

    def needed(self, step: Step) -> bool:
        return step.narrows

    def apply(self, step: Step, acts: GluConfig, x: Tensor | None) -> None:
        if x is not None:
            site = step.site
            power = contributions(partial(ffn_units, site), weight_rows(site.out_proj), x)
            _keep_units(site, power.topk(step.width).indices.sort().values)

    def tensors(self, step: Step) -> list[TensorRule] | None:
        return None  # which units are best, only inputs tell


class Widen:
    """Turn a dense in-projection into ``[gate | up]`` by the route's formula.

    Where up can have no bias, it gets the weights that are nearest to a constant of 1 on ``x``.
    """

    def needed(self, step: Step) -> bool:
        return step.gated and not step.site.native and not step.site.activation

    def apply(self, step: Step, acts: GluConfig, x: Tensor | None) -> None:
        in_proj, route = step.site.in_proj, step.route
        rows, bias = weight_rows(in_proj), in_proj.bias
        if step.adds_bias:
            bias = torch.zeros_like(rows[:, 0])
        wide = route.widen(rows, bias=False)
        if step.unbiased and x is not None:
            gate, up = wide.chunk(2)
            wide = torch.cat([gate, constant_direction(x).to(up).expand_as(up)])
        set_rows(in_proj, wide, None if bias is None else route.widen(bias, bias=True))
        note_making(step.site)

    def tensors(self, step: Step) -> list[TensorRule] | None:

        def make(tensor: Tensor, bias: bool, dim: int) -> Tensor:
            return step.route.widen(tensor, bias=bias, dim=dim)

        return [TensorRule.of(step.site, make, times=2, adds_bias=step.adds_bias)]


class Regate:
    """Put another activation in the old one's place, start it there, and hand the old one's parameters on."""

    def needed(self, step: Step) -> bool:
        return step.site.native or step.site.activation != step.target

    def apply(self, step: Step, acts: GluConfig, x: Tensor | None) -> None:
        site, target = step.site, step.target
        own = gate_of(site.anchor) if site.kind == "mixer" else None
        old = build_elementwise(own) if own else site.act
        act = build_elementwise(native_gate(target)) if site.native else registry[target].factory()
        inside = set(site.act.parameters())
        like = next(each for each in site.anchor.parameters() if each not in inside)
        site.set_act(act.to(device=like.device, dtype=like.dtype).train(old.training))
        configure(site, acts)
        _start_at(step, old)
        if site.kind == "mixer":
            own_gate(site.anchor, str(site.anchor.activation))

    def tensors(self, step: Step) -> list[TensorRule] | None:
        if registry[step.target].flags != {GATED}:
            raise CheckpointError(f"{step.target} has parameters of its own, which aren't streamed: leave --stream out")
        return []  # the config alone says it


# what an in-projection in memory, not in checkpoints, knows of its making: a checksum of the out-projection it had
_SUM = "_hf_glu_out_sum"

PARTS: tuple[GatePart, ...] = (Narrow(), Widen(), Regate())


def _start_at(step: Step, old: nn.Module) -> None:
    """Hand the old activation itself on to the new one, where that contains it: it may have trained parameters."""
    site = step.site
    had: dict[type[nn.Module], nn.Module] = {type(shift): shift for shift in shifts(old)}
    for module in site.act.modules():
        for name, part in module.named_children():
            if type(part) in had:  # more wrappers around what is wrapped already
                setattr(module, name, had[type(part)])
    owner, inner = innermost(site.act)
    before = innermost(old)[1]
    if core(step.source) == core(step.target) and owner is not None:
        owner.phi = before
    elif isinstance(inner, LearnableMix):
        inner.start_at(core(step.source), before)


def _keep_units(site: Site, kept: Tensor) -> None:
    """Drop all other units: their rows in the in-projections (in both halves of a packed one), their out-columns."""
    *ins, out_proj = projections(site)
    halves = torch.cat([kept, kept + site.width]) if site.widened or site.kind == "packed" else kept
    for module in ins:
        set_rows(module, weight_rows(module)[halves], None if module.bias is None else module.bias[halves])
    set_rows(out_proj, weight_rows(out_proj)[:, kept], out_proj.bias)


def note_making(site: Site) -> None:
    """Remember the out-projection of a site that is being widened, before it is fitted."""
    vars(site.in_proj)[_SUM] = checksum(*site.out_proj.parameters(recurse=False))


def made_with(site: Site) -> bool | None:
    """Return whether a site has the out-projection that it was converted with; None: nobody knows."""
    known = vars(site.in_proj).get(_SUM)
    return None if known is None else bool(known == checksum(*site.out_proj.parameters(recurse=False)))
