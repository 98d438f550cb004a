"""The stateful gate as one operator of torch, opaque to ``torch.compile``, with its own gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_glu.activation.kernels.autodiff import differentiable, is_transformed
from hf_glu.activation.kernels.scan import blocks
from hf_glu.activation.kernels.scan.linear import BACKENDS, ends, sides
from hf_glu.activation.kernels.scan.traced import traced


def state_dtype(gate: Tensor) -> torch.dtype:
    """Return the precision of the state: float32, or float64 for such a gate."""
    return torch.promote_types(gate.dtype, torch.float32)


def _gate(
    alpha: Tensor, beta: Tensor, decay: Tensor, valid: Tensor | None, restart: Tensor | None, reverse: bool,
    backend: str, dtype: torch.dtype,
) -> blocks.GateBlock:  # fmt: skip
    alpha, beta, decay = (parameter.to(dtype) for parameter in (alpha, beta, decay))
    gate = blocks.GateBlock(beta, decay, 1 - decay, alpha - beta, BACKENDS[backend], reverse)
    return gate.masked(valid, restart)


def value(
    gate: Tensor, alpha: Tensor, beta: Tensor, decay: Tensor, start: Tensor | None, valid: Tensor | None,
    restart: Tensor | None, reverse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return z ``[B, T, W]`` and the states ``[T + 1, B, W]`` with the start among them (last in reverse)."""
    z, trail = empty(gate)
    trail[ends(reverse)[0]] = 0 if start is None else start
    parameters = _gate(alpha, beta, decay, valid, restart, reverse, backend, trail.dtype)
    blocks.forward(parameters, gate.transpose(0, 1), z.transpose(0, 1), trail)
    return z, trail


def _gradients(
    dz: Tensor, dtrail: Tensor | None, gate: Tensor, alpha: Tensor, beta: Tensor, decay: Tensor, trail: Tensor,
    valid: Tensor | None, restart: Tensor | None, reverse: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the gate, of alpha, beta and decay ``[3, W]``, and of start ``[B, W]``."""
    dgate = gate.new_empty(gate.shape)
    dstates = None if dtrail is None else sides(dtrail, reverse)[0]
    parameters = _gate(alpha, beta, decay, valid, restart, reverse, backend, trail.dtype)
    sums, dstart = blocks.backward(
        parameters, dz.transpose(0, 1), dstates, gate.transpose(0, 1), trail, dgate.transpose(0, 1)
    )
    if dtrail is not None:
        dstart += dtrail[ends(reverse)[0]]
    return dgate, sums, dstart


def empty(gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return z and the states, unfilled."""
    batch, times, width = gate.shape
    return gate.new_empty(gate.shape), gate.new_empty(times + 1, batch, width, dtype=state_dtype(gate))


def _fake(gate: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty(gate)


def _fake_gradients(dz: Tensor, dtrail: Tensor | None, gate: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    z, trail = empty(gate)
    return z, trail.new_empty(3, gate.shape[2]), trail.new_empty(gate.shape[0], gate.shape[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    gate, alpha, beta, decay, start, valid, restart, ctx.reverse, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # the states' gradient is nearly always None, and costs nothing then
    ctx.save_for_backward(gate, alpha, beta, decay, output[1], start, valid, restart)


def _backward(ctx: Any, dz: Tensor | None, dtrail: Tensor | None) -> tuple[Tensor | None, ...]:
    gate, alpha, beta, decay, trail, start, valid, restart = ctx.saved_tensors
    if torch.is_grad_enabled() or is_transformed(gate, dz, dtrail):
        formula = partial(_formula, valid=valid, restart=restart, reverse=ctx.reverse)
        inputs, needed = (gate, alpha, beta, decay, start), ctx.needs_input_grad[:5]
        return *differentiable(formula, inputs, needed, (dz, dtrail)), None, None, None, None
    dz = torch.zeros_like(gate) if dz is None else dz
    dgate, sums, dstart = torch.ops.hf_glu.stateful_backward(
        dz, dtrail, gate, alpha, beta, decay, trail, valid, restart, ctx.reverse, ctx.backend
    )
    dalpha, dbeta, ddecay = (total.to(p.dtype) for total, p in zip(sums, (alpha, beta, decay), strict=True))
    return dgate, dalpha, dbeta, ddecay, None if start is None else dstart.to(start.dtype), None, None, None, None


def _formula(
    gate: Tensor,
    alpha: Tensor,
    beta: Tensor,
    decay: Tensor,
    start: Tensor | None,
    valid: Tensor | None,
    restart: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return what `value` does, by operations that have derivatives of any order."""
    z, states = traced(gate, alpha, beta, decay, start, valid, restart, reverse)
    first = states.new_zeros(states.shape[0], states.shape[2]) if start is None else start.to(states.dtype)
    parts = [first.unsqueeze(0), states.transpose(0, 1)]
    return z, torch.cat(parts[::-1] if reverse else parts)


def _refuse(ctx: Any, *_: Any) -> None:
    raise NotImplementedError("the operator's gradient has none itself: hf_glu.activation.kernels.scan.stateful has")


def _register(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    # not torch.library.custom_op: it costs 25 us more a call, and seconds at the first for importing the compiler
    torch.library.define(name, schema)
    torch.library.impl(name, "default", kernel)
    torch.library.register_fake(name, fake)


_PARAMETERS = "Tensor gate, Tensor alpha, Tensor beta, Tensor decay"
_OPTIONS = "Tensor? valid, Tensor? restart, bool reverse, str backend"
_register("hf_glu::stateful", f"({_PARAMETERS}, Tensor? start, {_OPTIONS}) -> (Tensor, Tensor)", value, _fake)
_register(
    "hf_glu::stateful_backward",
    f"(Tensor dz, Tensor? dtrail, {_PARAMETERS}, Tensor trail, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _gradients,
    _fake_gradients,
)
torch.library.register_autograd("hf_glu::stateful", _backward, setup_context=_save)
torch.library.register_autograd("hf_glu::stateful_backward", _refuse)
