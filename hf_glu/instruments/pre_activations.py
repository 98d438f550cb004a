"""A gate's pre-activation, wherever its family computes it: seeing it, and putting another in its place.

It is what the in-projection gives, before any wrapper of the activation: all of it where the FFN is dense, the half of
the gate where it is gated, and of a Mamba mixer the part that its scan's output is multiplied by.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from hf_glu.activation.kernels.formulas import split_gate_up
from hf_glu.activation.module import OwnedActivation
from hf_glu.ffn.linear import AnyLinear
from hf_glu.ffn.mixers import gate_begin
from hf_glu.ffn.sites import Site
from hf_glu.inplace import InPlace, become, become_stock
from hf_glu.instruments.recorder import Call, Watch

Shift: TypeAlias = Callable[[Tensor], Tensor]  # from a gate's pre-activations to those that it gets
_marking = threading.Lock()


class Handle(Protocol):
    """What takes a hook out again."""

    def remove(self) -> None:
        """Take it out."""


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
        return _Hooked(site.in_proj, site.in_proj.register_forward_hook(hook))
    return hook_activation(site.act, shift)


def hook_activation(act: nn.Module, shift: Shift) -> Handle:
    """Give an activation ``shift`` of its gate from now on."""
    return _Hooked(act, act.register_forward_pre_hook(partial(_before, shift=shift)))


class Marked(InPlace):
    """The class of a module while a hook of ours is on it.

    torch's compiler looks at a module's class before it runs what it has compiled, and not whether hooks have come.
    """

    hf_glu_hooks: int = 0


class _Hooked:
    """A hook, and its mark."""

    def __init__(self, module: nn.Module, handle: Handle) -> None:
        self.module, self.handle = module, handle
        with _marking:
            become(module, Marked)
            module.__dict__["hf_glu_hooks"] = module.__dict__.get("hf_glu_hooks", 0) + 1

    def remove(self) -> None:
        """Take the hook out; the last one takes the mark with it."""
        self.handle.remove()
        with _marking:
            module = self.module
            if module.__dict__.get("hf_glu_hooks", 0) > 1:
                module.__dict__["hf_glu_hooks"] -= 1
            else:
                become_stock(module, Marked)


def _before(act: nn.Module, args: tuple[Any, ...], *, shift: Shift) -> tuple[Any, ...]:
    x = args[0]
    if is_gated(act):
        gate, up = split_gate_up(x)
        return (torch.cat([shift(gate), up], dim=-1), *args[1:])
    return (shift(x), *args[1:])


def _after_projection(module: nn.Module, args: Any, out: Tensor, *, shift: Shift, begin: int, width: int) -> Tensor:
    before, gate, after = out.split([begin, width, out.shape[-1] - begin - width], dim=-1)
    return torch.cat([before, shift(gate), after], dim=-1)
