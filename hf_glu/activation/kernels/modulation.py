"""(x - T c) (1 + S c); on request with a gradient that keeps x and c only.

With e = x - T c, f = S c and d the gradient of y = e + e f:

    dx = d + d f,   p = e d,   dT = -dx^T c,   dS = p^T c,   dc = p S - dx T

Shapes: N rows, W channels, R size of c; x and y ``[N, W]``, c ``[N, R]``, T and S ``[W, R]``.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_glu.activation.kernels.autodiff import differentiable, needs_formula
from hf_glu.activation.kernels.blocks import exact, put, rows_of, split
from hf_glu.activation.kernels.compiled import SLOPES, Compiled, Kind, compile_formula, has_kernels, kind_of, wide


def modulate(x: Tensor, vector: Tensor, threshold: Tensor, slope: Tensor) -> Tensor:
    """Return the modulated x."""
    shifted = x - functional.linear(vector, threshold.to(x.dtype))
    return torch.addcmul(shifted, shifted, functional.linear(vector, slope.to(x.dtype)))


def fused_modulation(phi: nn.Module, x: Tensor, vector: Tensor, threshold: Tensor, slope: Tensor) -> Tensor:
    """Return phi of the modulated x in one pass, and with a gradient in one pass, where there are kernels."""
    kernels = _compiled_modulation(kind_of(phi)) if has_kernels((phi,), x.device.type) else None
    if kernels is None or not x.numel() or needs_formula(x, vector, threshold, slope):
        return _then(phi, x, vector, threshold, slope)
    y: Tensor = FusedModulation.apply(phi, kernels, x, vector, threshold, slope)
    return y


def _then(phi: nn.Module, *given: Tensor) -> Tensor:
    y: Tensor = phi(modulate(*given))
    return y


def recomputed_modulation(x: Tensor, vector: Tensor, threshold: Tensor, slope: Tensor) -> Tensor:
    """Return the same, block by block; the backward pass computes threshold and slope again."""
    if not x.numel() or needs_formula(x, vector, threshold, slope):
        return modulate(x, vector, threshold, slope)
    y: Tensor = RecomputedModulation.apply(x, vector, threshold, slope)
    return y


class RecomputedModulation(torch.autograd.Function):
    """The modulation, block by block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, vector: Tensor, threshold: Tensor, slope: Tensor) -> Tensor:
        """Return y, and keep the inputs."""
        ctx.save_for_backward(x, vector, threshold, slope)
        y, parts = torch.empty_like(x, memory_format=torch.contiguous_format), _Parts(x, threshold, slope)
        with torch.autocast(x.device.type, enabled=False):
            for x_b, c, y_b in split(parts.rows, x, vector, y):
                e, f, _ = parts(x_b, c)
                put(y_b, partial(torch.addcmul, e, e, f), e)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; where they are to have gradients themselves, by autograd."""
        (d,), (x, vector, threshold, slope) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled() or needs_formula(x, d):
            return (*differentiable(modulate, ctx.saved_tensors, ctx.needs_input_grad, (d,)),)
        dx, p = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
        parts = _Parts(x, threshold, slope)
        for x_b, c, d_b, dx_b, p_b in split(parts.rows, x, vector, d, dx, p):
            e, f, free = parts(x_b, c)
            d_b = exact(d_b, free)
            put(dx_b, partial(torch.addcmul, d_b, d_b, f), f)
            put(p_b, partial(torch.mul, e, d_b), e)
        return dx, *_of_the_rest(dx, p, vector, threshold, slope, ctx.needs_input_grad[1])


def _of_the_rest(
    dx: Tensor, p: Tensor, vector: Tensor, threshold: Tensor, slope: Tensor, needs_vector: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of c, T and S."""
    down, up = (parameter.to(dx.dtype) for parameter in (threshold, slope))
    dvector = torch.addmm(p @ up, dx, down, alpha=-1) if needs_vector else None
    dthreshold, dslope = (vector.T @ dx).neg_(), vector.T @ p  # in this order: three times as fast
    return dvector, dthreshold.T.to(threshold.dtype), dslope.T.to(slope.dtype)


class FusedModulation(torch.autograd.Function):
    """phi of the modulation z, one pass each way: with d the gradient of phi(z), that of z is d phi'(z)."""

    @staticmethod
    def forward(
        ctx: Any, phi: nn.Module, kernels: Compiled, x: Tensor, vector: Tensor, threshold: Tensor, slope: Tensor
    ) -> Tensor:
        """Return phi(z), and keep the inputs."""
        ctx.phi, ctx.kernels = phi, kernels
        ctx.save_for_backward(x, vector, threshold, slope)
        y: Tensor = kernels.value(x.detach(), *_rows(vector, threshold, slope))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; where they are to have gradients themselves, by autograd."""
        (d,), (x, vector, threshold, slope) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled() or needs_formula(x, d):
            formula = partial(_then, ctx.phi)
            return None, None, *differentiable(formula, ctx.saved_tensors, ctx.needs_input_grad[2:], (d,))
        dx, p = ctx.kernels.gradient(x.detach(), *_rows(vector, threshold, slope), d.detach())
        return None, None, dx, *_of_the_rest(dx, p, vector, threshold, slope, ctx.needs_input_grad[3])


def _rows(vector: Tensor, threshold: Tensor, slope: Tensor) -> list[Tensor]:
    """Return T c and S c of each row, ``[N, W]``, without a graph."""
    c = wide(vector.detach())
    with torch.autocast(vector.device.type, enabled=False):
        return [functional.linear(c, wide(each.detach())) for each in (threshold, slope)]


@cache
def _compiled_modulation(kind: Kind) -> Compiled:
    phi, phi_slope = kind(), SLOPES[kind]

    def value(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        e = wide(x) - t
        y: Tensor = phi(e + e * s)
        return y.to(x.dtype)

    def gradient(x: Tensor, t: Tensor, s: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        e = wide(x) - t
        dz = phi_slope(wide(d), e + e * s)
        return (dz + dz * s).to(x.dtype), (dz * e).to(x.dtype)

    return Compiled(compile_formula(value), compile_formula(gradient))


class _Parts:
    """Computes e and f of a block in its buffers, in float32, or float64 for such an x."""

    def __init__(self, x: Tensor, threshold: Tensor, slope: Tensor) -> None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.down, self.slope = threshold.to(dtype).neg().T.contiguous(), slope.to(dtype).T.contiguous()
        self.rows = rows_of(x)
        self.buffers = x.new_empty(3, self.rows, x.shape[1], dtype=dtype)

    def __call__(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return e, f, and another buffer."""
        (e, f, free), c = self.buffers[:, : len(x)], c.to(self.buffers.dtype)
        torch.mm(c, self.down, out=e).add_(x)
        torch.mm(c, self.slope, out=f)
        return e, f, free
