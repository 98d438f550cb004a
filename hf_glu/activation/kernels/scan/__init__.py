"""The recurrence of a stateful gate, linear in time and memory, with no autograd graph per token.

    n_t = sigmoid(g_t)
    s_t = decay * s_(t-1) + (1 - decay) * n_t     at valid tokens, else s_t = s_(t-1)
    z_t = g_t + alpha * s_(t-1) + beta * (n_t - s_(t-1))

per row of the batch and channel: a running mean of the gate's openness. alpha > 0 is coherence (a gate that was closed
tends to stay closed), beta sensitivity to sudden change; at alpha = beta = 0, z is g.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_glu.activation.kernels.autodiff import is_transformed
from hf_glu.activation.kernels.scan import operator
from hf_glu.activation.kernels.scan.linear import BACKENDS, backend_for, sides
from hf_glu.activation.kernels.scan.traced import traced
from hf_glu.compat.of_torch import is_exporting
from hf_glu.errors import OptionError, nearest

__all__ = ["bidirectional", "decays", "spread_decays", "stateful", "step"]


def stateful(
    gate: Tensor, alpha: Tensor, beta: Tensor, decay: Tensor, *, start: Tensor | None = None,
    valid: Tensor | None = None, restart: Tensor | None = None, reverse: bool = False, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the pre-activation z ``[B, T, W]`` and the states ``[B, T, W]``, where ``states[:, t]`` is s_t.

    Differentiable in gate, alpha, beta, decay and start. The state, and all arithmetic, is float32 at least; z has the
    gate's dtype. The states are a view of what the gradient needs: clone the last one to keep it in a cache.

    Args:
        gate: g ``[B, T, W]``.
        alpha: ``[W]``.
        beta: ``[W]``.
        decay: ``[W]``, within (0, 1), which isn't checked; in float32 where it may be near 1.
        start: the state before the first token ``[B, W]`` (in reverse: after the last); None: 0.
        valid: bool ``[B, T]``, False at padding, which must be finite; None: all True.
        restart: bool ``[B, T]``, True where a new text starts: its first token (in reverse: the token before, the last
            of the text before) reads a state of 0; None: all False.
        reverse: walk from the last token to the first: s_t then comes from s_(t+1).
        backend: "walk" (token by token, in cache; on a CPU) or "parallel" (log depth); None: by the device.

    Raises:
        OptionError: a wrong shape or dtype, an unknown backend, or "walk" elsewhere than on a CPU.
    """
    _check(gate, {"alpha": alpha, "beta": beta, "decay": decay}, start, {"valid": valid, "restart": restart})
    backend = backend_for(gate.device) if backend is None else backend
    if backend not in BACKENDS:
        raise OptionError(f"unknown backend {backend!r}; {nearest(backend, BACKENDS)}")
    if backend == "walk" and gate.device.type != "cpu":
        raise OptionError(f"backend 'walk' runs on a CPU, not on {gate.device}; choose 'parallel' or None")
    if gate.shape[1] == 1 and start is not None and valid is None and restart is None and not torch.is_grad_enabled():
        alpha, beta, decay = (parameter.to(start.dtype) for parameter in (alpha, beta, decay))
        return step(gate, alpha, beta, decay, start.unsqueeze(1))
    if restart is not None and reverse:
        restart = torch.cat([restart[:, 1:], torch.zeros_like(restart[:, :1])], dim=1)
    # a graph for any runtime has no such operator, nor do torch's transforms know it
    if is_exporting() or is_transformed(gate, alpha, beta, decay, start):
        return traced(gate, alpha, beta, decay, start, valid, restart, reverse)
    seen = torch.compiler.is_compiling() or torch.is_grad_enabled() or type(gate) is not Tensor
    run = torch.ops.hf_glu.stateful if seen else operator.value  # what the operator does, without its dispatch
    z, trail = run(gate, alpha, beta, decay, start, valid, restart, reverse, backend)
    return z, sides(trail, reverse)[0].transpose(0, 1)


def step(gate: Tensor, alpha: Tensor, beta: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `stateful` gives for one token ``[B, 1, W]``, with no operator and no checks around it.

    Decoding calls this for each layer: the fewest operations, s_t as n_t - decay (n_t - s_(t-1)). The parameters are in
    the state's precision.
    """
    wide = gate.to(state.dtype)
    openness = wide.sigmoid()
    ahead = openness - state
    z = torch.addcmul(torch.addcmul(wide, alpha, state), beta, ahead)
    return z.to(gate.dtype), torch.addcmul(openness, decay, ahead, value=-1)


def bidirectional(
    gate: Tensor, alpha: Tensor, beta: Tensor, decay: Tensor, *, valid: Tensor | None = None,
    restart: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Return z ``[B, T, W]`` with the mean of both directions' states in place of s_(t-1), for encoders.

    z is linear in the state, so that it is the mean of both directions' z. Arguments and errors as in `stateful`.
    """
    forth, back = (
        stateful(gate, alpha, beta, decay, valid=valid, restart=restart, reverse=reverse, backend=backend)[0]
        for reverse in (False, True)
    )
    return torch.lerp(forth, back, 0.5)


def decays(logits: Tensor) -> Tensor:
    """Return the decays sigmoid(logits), in float32 at least: near 1, half precision has none between."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()


def spread_decays(ends: tuple[float, float], count: int) -> Tensor:
    """Return the logits of ``count`` decays from one of ``ends`` to the other, evenly in log(1 - decay)."""
    low, high = (math.log(1 - decay) for decay in ends)
    return (1 - torch.linspace(low, high, count).exp()).logit()


def _check(gate: Tensor, parameters: dict[str, Tensor], start: Tensor | None, masks: dict[str, Tensor | None]) -> None:
    """Refuse wrong shapes and dtypes."""
    if gate.dim() != 3 or not gate.is_floating_point():
        raise OptionError(f"gate must be a floating-point [batch, time, width], got {gate.dtype} {tuple(gate.shape)}")
    batch, times, width = gate.shape
    expected = [(name, tensor, (width,)) for name, tensor in parameters.items()] + [("start", start, (batch, width))]
    expected += [(name, mask, (batch, times)) for name, mask in masks.items()]
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise OptionError(f"{name} must be {list(shape)} for a gate {list(gate.shape)}, got {list(tensor.shape)}")
    for name, mask in masks.items():
        if mask is not None and mask.dtype != torch.bool:
            raise OptionError(f"{name} must be bool, True or False per token, got {mask.dtype}")
