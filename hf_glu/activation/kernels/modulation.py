"""(x - T c) (1 + S c); on request with a gradient that keeps x and c only.

With e = x - T c, f = S c and d the gradient of y = e + e f:

    dx = d + d f,   p = e d,   dT = -dx^T c,   dS = p^T c,   dc = p S - dx T

Shapes: N rows, W channels, R size of c; x and y ``[N, W]``, c ``[N, R]``, T and S ``[W, R]``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_glu.activation.kernels.autodiff import differentiable, needs_formula
from hf_glu.activation.kernels.blocks import exact, put, rows_of, split


def modulate(x: Tensor, vector: Tensor, threshold: Tensor, slope: Tensor) -> Tensor:
    """Return the modulated x."""
    shifted = x - functional.linear(vector, threshold.to(x.dtype))
    return torch.addcmul(shifted, shifted, functional.linear(vector, slope.to(x.dtype)))


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
        down, up = (parameter.to(x.dtype) for parameter in (threshold, slope))
        dvector = torch.addmm(p @ up, dx, down, alpha=-1) if ctx.needs_input_grad[1] else None
        dthreshold, dslope = (vector.T @ dx).neg_(), vector.T @ p  # in this order: three times as fast
        return dx, dvector, dthreshold.T.to(threshold.dtype), dslope.T.to(slope.dtype)


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
