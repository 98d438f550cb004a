"""Value and gradient of the stateful gate, one block at a time. Tensors here have the time first.

    s_t = r_t s_(t-1) + (1 - decay) v_t n_t,   r_t = k_t (v_t decay + 1 - v_t),   n_t = sigmoid(g_t)
    z_t = g_t + beta n_t + (alpha - beta) p_t,   p_t = k_t s_(t-1)

v_t is 1 at valid tokens, else 0; k_t is 0 where the state restarts, else 1. With D_t the gradient that reaches s_t and
E_t what step t hands on to s_(t-1), the gradient is a recurrence of the same rates the other way round:

    E_t = r_t D_t + (alpha - beta) k_t dz_t,   D_t = ds_t + E_(t+1)
    dg_t = dz_t + (beta dz_t + (1 - decay) v_t D_t) n_t (1 - n_t)
    dalpha = sum dz_t p_t,   dbeta = sum dz_t (n_t - p_t),   ddecay = -sum v_t D_t (n_t - p_t)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from hf_glu.activation.kernels.scan.linear import Backend, ends, sides
from hf_glu.compat.of_torch import aten

MASKS = ("valid", "alive", "moving", "waiting")


@dataclass(frozen=True)
class GateBlock:
    """A stateful gate: parameters ``[W]`` in the state's precision, and masks ``[T, B, 1]`` as numbers.

    Attributes:
        gain: 1 - decay.
        share: alpha - beta, that of the state in z.
        valid: v; None: all 1.
        alive: k; None: all 1.
        moving: k v, the part of r that decays; None: all 1.
        waiting: k (1 - v), the part of r that doesn't; None: all 0.
    """

    beta: Tensor
    decay: Tensor
    gain: Tensor
    share: Tensor
    backend: Backend
    reverse: bool
    valid: Tensor | None = None
    alive: Tensor | None = None
    moving: Tensor | None = None
    waiting: Tensor | None = None

    def masked(self, valid: Tensor | None, restart: Tensor | None) -> GateBlock:
        """Return the gate with its masks, made of bool ``[B, T]``."""
        if valid is None and restart is None:
            return self
        v, k = (None if mask is None else mask.t()[..., None].to(self.decay) for mask in (valid, restart))
        k = None if k is None else 1 - k
        one = self.decay.new_ones(())
        moving = (one if v is None else v) * (one if k is None else k)
        waiting = None if v is None else (1 - v) * (one if k is None else k)
        return replace(self, valid=v, alive=k, moving=moving, waiting=waiting)

    def rates(self, steps: int) -> Tensor:
        """Return r ``[steps, B or 1, W]``."""
        if self.moving is None:
            return self.decay.expand(steps, 1, -1)
        rates = self.moving * self.decay
        return rates if self.waiting is None else rates.add_(self.waiting)

    def read(self, before: Tensor) -> Tensor:
        """Return p, what steps read of the states before them."""
        return before if self.alive is None else before * self.alive


def split(size: int, dim: int, gate: GateBlock, *tensors: Tensor | None) -> Iterator[Any]:
    """Yield the blocks ``(gate, *tensors)`` that `torch.split` cuts the tensors and the gate's masks into."""
    masks = () if gate.moving is None else tuple(getattr(gate, name) for name in MASKS)
    parts = [repeat(None) if tensor is None else tensor.split(size, dim) for tensor in (*tensors, *masks)]
    for block in zip(*parts, strict=False):
        own = dict(zip(MASKS, block[len(tensors) :], strict=False))
        yield replace(gate, **own) if own else gate, *block[: len(tensors)]


def forward(gate: GateBlock, gates: Tensor, z: Tensor, trail: Tensor) -> None:
    """Fill z ``[T, B, W]`` and the states ``[T + 1, B, W]``, of which the one that the walk starts from is given."""
    if not gates.numel():
        return
    steps, rows = gate.backend.block(*gates.shape)
    if steps >= gates.shape[0] and rows >= gates.shape[1]:
        _forward(gate, gates, z, *sides(trail, gate.reverse))
        return
    for part in split(rows, 1, gate, gates, z, *sides(trail, gate.reverse)):
        for block in ordered(split(steps, 0, *part), gate.reverse):
            _forward(*block)


def ordered(blocks: Iterable[Any], reverse: bool) -> Iterable[Any]:
    """Return blocks in the order of a walk."""
    return reversed(list(blocks)) if reverse else blocks


def _forward(gate: GateBlock, gates: Tensor, z: Tensor, now: Tensor, before: Tensor) -> None:
    """Fill one block of z and of the states ``now``, which ``before`` has one step later."""
    g = gates.to(now.dtype)
    n = torch.sigmoid(g)
    torch.mul(n, gate.gain, out=now)
    if gate.valid is not None:
        now.mul_(gate.valid)
    gate.backend.scan(now, before[ends(gate.reverse)[0]], gate.rates(len(now)), gate.reverse)
    torch.addcmul(g, n, gate.beta, out=n)
    torch.addcmul(n, gate.read(before), gate.share, out=z)


def backward(
    gate: GateBlock, dz: Tensor, dstates: Tensor | None, gates: Tensor, trail: Tensor, dgates: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill the gradient of the gate ``[T, B, W]``; return those of alpha, beta, decay ``[3, W]`` and start ``[B, W]``.

    ``dstates`` ``[T, B, W]`` is the gradient that comes in from the states themselves.
    """
    dstart, sums = torch.zeros_like(trail[0]), trail.new_zeros(3, trail.shape[2])
    if not gates.numel():
        return sums, dstart
    steps, rows = gate.backend.block(*gates.shape)
    before = sides(trail, gate.reverse)[1]
    for *part, handed in split(rows, 1, gate, dz, dstates, gates, before, dgates, dstart[None]):
        totals = trail.new_zeros(3, *part[4][:steps].shape)
        for block in ordered(split(steps, 0, *part), not gate.reverse):
            _backward(handed[0], totals[:, : len(block[1])], *block)
        sums += totals.sum((1, 2))
    return sums, dstart


def _backward(
    handed: Tensor, totals: Tensor, gate: GateBlock, dz: Tensor, dstates: Tensor | None, gates: Tensor, before: Tensor,
    dgates: Tensor,
) -> None:  # fmt: skip
    """Fill one block of the gate's gradient, add to the parameters', and replace E that was handed to this block."""
    dz, before = dz.to(before.dtype), gate.read(before)
    reaching = _adjoint(gate, dz, dstates, handed)
    n = torch.sigmoid(gates.to(before.dtype))
    ahead = n - before
    totals[0].addcmul_(dz, before)
    totals[1].addcmul_(dz, ahead)
    totals[2].addcmul_(reaching, ahead, value=-1)
    dn = torch.mul(dz, gate.beta, out=ahead).addcmul_(reaching, gate.gain)
    torch.add(aten.sigmoid_backward(dn, n), dz, out=dgates)


def _adjoint(gate: GateBlock, dz: Tensor, dstates: Tensor | None, handed: Tensor) -> Tensor:
    """Return v D of a block, and replace E that was handed to it by the one it hands on."""
    reverse = not gate.reverse
    first, last = ends(reverse)
    window = handed.new_empty(len(dz) + 1, *handed.shape)
    now, reaching = sides(window, reverse)
    window[first] = handed
    torch.mul(dz, gate.share, out=now)
    if gate.alive is not None:
        now.mul_(gate.alive)
    rates = gate.rates(len(dz))
    if dstates is not None:
        now.addcmul_(rates, dstates)
    gate.backend.scan(now, handed, rates, reverse)
    handed.copy_(window[last])
    if dstates is not None:
        reaching = reaching + dstates
    return reaching if gate.valid is None else reaching * gate.valid
