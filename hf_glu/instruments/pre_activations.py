"""A gate's pre-activation, wherever its family computes it: seeing it, and putting another in its place.

It is what the in-projection gives, before any wrapper of the activation: all of it where the FFN is dense, the half of
the gate where it is gated, and of a Mamba mixer the part that its scan's output is multiplied by.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hf_glu.activation.kernels.formulas import split_gate_up
from hf_glu.activation.module import OwnedActivation
from hf_glu.ffn.linear import AnyLinear
from hf_glu.ffn.mixers import gate_begin
from hf_glu.ffn.sites import Site
from hf_glu.instruments.hooks import Handle, hook_after, hook_before
from hf_glu.instruments.recorder import Call, Watch

Shift: TypeAlias = Callable[[Tensor], Tensor]  # from a gate's pre-activations to those that it gets


def gate_rows(site: Site) -> tuple[AnyLinear, int]:
    """Return the projection that makes a site's gate, and which of its rows is the gate's first."""
    if site.kind == "mixer":
        return site.in_proj, gate_begin(site.anchor)
    if site.row.gate is not None:
        gate: Any = site.anchor.get_submodule(site.row.gate)
        return gate, 0
    return site.in_proj, 0


def watch_gate(site: Site, see: Callable[[Call, Tensor], None]) -> Watch:
    """Return the watch by which ``see`` is called with each call of a gate and its pre-activation ``[..., W]``."""
    if site.kind == "mixer":  # whose activation is its convolution's, too
        begin, width = gate_begin(site.anchor), site.width
        return Watch(module=site.in_proj, after=True, see=lambda call: see(call, call.output[..., begin:][..., :width]))
    if is_gated(site.act):
        return Watch(module=site.act, see=lambda call: see(call, split_gate_up(call.x)[0]))
    return Watch(module=site.act, see=lambda call: see(call, call.x))


def is_gated(act: nn.Module) -> bool:
    """Return whether an activation is given ``[g | u]``."""
    return isinstance(act, OwnedActivation) and act.gated


def hook_gate(site: Site, shift: Shift) -> Handle:
    """Give a site's gate ``shift`` of its pre-activation ``[..., W]`` from now on."""
    if site.kind == "mixer":
        begin, width = gate_begin(site.anchor), site.width
        hook = partial(_after_projection, shift=shift, begin=begin, width=width)
        return hook_after(site.in_proj, hook)
    return hook_activation(site.act, shift)


def hook_activation(act: nn.Module, shift: Shift) -> Handle:
    """Give an activation ``shift`` of its gate from now on."""
    return hook_before(act, partial(_before, shift=shift))


def _before(act: nn.Module, args: tuple[Any, ...], *, shift: Shift) -> tuple[Any, ...]:
    x = args[0]
    if is_gated(act):
        gate, up = split_gate_up(x)
        return (torch.cat([shift(gate), up], dim=-1), *args[1:])
    return (shift(x), *args[1:])


def _after_projection(module: nn.Module, args: Any, out: Tensor, *, shift: Shift, begin: int, width: int) -> Tensor:
    before, gate, after = out.split([begin, width, out.shape[-1] - begin - width], dim=-1)
    return torch.cat([before, shift(gate), after], dim=-1)
