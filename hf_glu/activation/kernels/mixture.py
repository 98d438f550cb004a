"""sum_k a_k phi_k(x); on request so that it keeps x and the coefficients only, and computes the functions again.

Coefficients are of each channel, of each row, or the sum of both. With d the gradient of y:

    dx = sum_k a_k d phi_k'(x),   da_k = d phi_k(x), summed over what has a_k in common

Shapes: N rows, W channels, K functions; x and y ``[N, W]``, channel ``[K, W]``, row ``[N, K]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.kernels.autodiff import differentiable, needs_formula
from hf_glu.activation.kernels.blocks import exact, rows_of, split
from hf_glu.activation.kernels.compiled import (
    SLOPES,
    Compiled,
    Kind,
    compile_formula,
    detached,
    has_kernels,
    kind_of,
    wide,
)
from hf_glu.activation.kernels.elementwise import Kernel, kernel_of
from hf_glu.activation.kernels.known import is_known


def mix(functions: Sequence[nn.Module], x: Tensor, channel: Tensor | None, row: Tensor | None) -> Tensor:
    """Return sum_k (channel_k + row_k) phi_k(x); of the coefficients, one may be None."""
    terms = [a * function(x) for function, a in zip(functions, _coefficients(channel, row), strict=True)]
    return sum(terms[1:], terms[0]).to(x.dtype)


def _coefficients(channel: Tensor | None, row: Tensor | None) -> Iterator[Any]:
    """Yield a_k, in a shape that spreads over ``[N, W]``."""
    columns = None if row is None else row.unsqueeze(-1).unbind(1)
    if channel is None or columns is None:
        yield from channel if columns is None else columns  # type: ignore[misc]
    else:
        yield from (a + b for a, b in zip(channel, columns, strict=True))


def recomputed_mix(
    functions: Sequence[nn.Module], x: Tensor, channel: Tensor | None, row: Tensor | None, *, fused: bool = False
) -> Tensor:
    """Return the same, block by block; the backward pass computes the functions again where all are known exactly.

    ``fused`` has it in one pass each way, where there are kernels.
    """
    if not x.numel() or needs_formula(x, channel, row) or not all(is_known(function) for function in functions):
        return mix(functions, x, channel, row)
    kernels = find_mix(functions, x.device.type) if fused else None
    y: Tensor = RecomputedMix.apply(tuple(functions), kernels, x, channel, row)
    return y


class RecomputedMix(torch.autograd.Function):
    """The mix, block by block."""

    @staticmethod
    def forward(
        ctx: Any, functions: tuple[nn.Module, ...], kernels: Compiled | None,
        x: Tensor, channel: Tensor | None, row: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return y, and keep x and the coefficients."""
        ctx.functions, ctx.kernels = functions, kernels
        ctx.save_for_backward(x, channel, row)
        if kernels:
            made: Tensor = kernels.value(*detached(x, channel, row))
            return made
        y, worker = torch.empty_like(x, memory_format=torch.contiguous_format), _Worker(functions, x, channel)
        for block in split(worker.rows, x, row, y):
            worker.value(*block)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; where they are to have gradients themselves, by autograd."""
        (d,), (x, channel, row) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled() or needs_formula(x, d):
            formula = partial(mix, ctx.functions)
            return None, None, *differentiable(formula, (x, channel, row), ctx.needs_input_grad[2:], (d,))
        if ctx.kernels:
            return None, None, *ctx.kernels.gradient(*detached(x, channel, row, d))
        worker, dx = _Worker(ctx.functions, x, channel), torch.empty_like(x, memory_format=torch.contiguous_format)
        drow = None if row is None else torch.empty_like(row, memory_format=torch.contiguous_format)
        dchannel = None if channel is None else torch.zeros_like(channel)
        for parts in split(worker.rows, x, row, d, dx, drow):
            worker.gradients(dchannel, *parts)
        return None, None, dx, dchannel, drow


def find_mix(functions: Sequence[nn.Module], device: str) -> Compiled | None:
    """Return the kernels of a mix of these functions on a type of device, None where there are none."""
    if not has_kernels(functions, device):
        return None
    return _compiled_mix(tuple(kind_of(function) for function in functions))


@cache
def _compiled_mix(kinds: tuple[Kind, ...]) -> Compiled:
    functions, slopes = [kind() for kind in kinds], [SLOPES[kind] for kind in kinds]

    def value(x: Tensor, channel: Tensor | None, row: Tensor | None) -> Tensor:
        return mix(functions, wide(x), channel, row).to(x.dtype)

    def gradient(
        x: Tensor, channel: Tensor | None, row: Tensor | None, d: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        (g, d), coefficients = (wide(x), wide(d)), _coefficients(channel, row)
        dx = sum(a * slope(d, g) for a, slope in zip(coefficients, slopes, strict=True))
        products = [d * function(g) for function in functions]
        dchannel = None if channel is None else torch.stack([each.sum(0) for each in products]).to(channel.dtype)
        drow = None if row is None else torch.stack([each.sum(1) for each in products], 1).to(row.dtype)
        assert isinstance(dx, Tensor)
        return dx.to(x.dtype), dchannel, drow

    return Compiled(compile_formula(value), compile_formula(gradient))


class _Worker:
    """What is done with a block, and its buffers; the precision is float32, or float64 for such an x."""

    def __init__(self, functions: tuple[nn.Module, ...], x: Tensor, channel: Tensor | None) -> None:
        self.functions = [(function, kernel_of(function)) for function in functions]
        self.channel, self.rows = channel, rows_of(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.buffers = x.new_empty(5, self.rows, x.shape[1], dtype=dtype)

    def value(self, raw: Tensor, row: Tensor | None, y: Tensor) -> None:
        """Fill y."""
        phi, total, x, *_ = self.buffers[:, : len(raw)]
        x, total = exact(raw, x), y if y.dtype == total.dtype else total
        for k, (function, kernel, a) in enumerate(self.terms(row)):
            kernel.value(x, phi) if kernel else phi.copy_(function(raw))
            torch.mul(phi, a, out=total) if k == 0 else total.addcmul_(phi, a)
        if total is not y:
            y.copy_(total)

    def gradients(
        self, dchannel: Tensor | None, raw: Tensor, row: Tensor | None, gradient: Tensor, dx: Tensor,
        drow: Tensor | None,
    ) -> None:  # fmt: skip
        """Fill the gradients of a block, and add to that of the channels' coefficients."""
        phi, total, x, d, product = self.buffers[:, : len(raw)]
        x, d, total = exact(raw, x), exact(gradient, d), dx if dx.dtype == total.dtype else total
        for k, (function, kernel, a) in enumerate(self.terms(row)):
            slope = phi
            if kernel:
                kernel.value(x, phi)
            else:
                value, slope = by_autograd(function, raw, d)
                phi.copy_(value)
            torch.mul(phi, d, out=product)
            if drow is not None:
                torch.sum(product, 1, out=drow[:, k])
            if dchannel is not None:
                dchannel[k] += product.sum(0)
            kernel.slope(d, x, phi, phi) if kernel else phi.copy_(slope)
            torch.mul(phi, a, out=total) if k == 0 else total.addcmul_(phi, a)
        if total is not dx:
            dx.copy_(total)

    def terms(self, row: Tensor | None) -> Iterator[tuple[nn.Module, Kernel | None, Tensor]]:
        """Yield each function with its kernel and coefficient."""
        coefficients = _coefficients(self.channel, row)
        for (function, kernel), coefficient in zip(self.functions, coefficients, strict=True):
            yield function, kernel, coefficient


def by_autograd(function: nn.Module, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return phi(x) and d phi'(x)."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = function(leaf)
        (slope,) = torch.autograd.grad(value, leaf, d.to(value.dtype), materialize_grads=True)
    return value.detach(), slope
