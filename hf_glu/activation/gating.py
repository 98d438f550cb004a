"""phi(g) * u with a gradient that keeps ``[g | u]`` only, and computes phi again, block by block.

With d the gradient of y:  dg = d u phi'(g),  du = d phi(g).

Shapes: N rows, W channels; x ``[N, 2 W]`` = ``[g | u]``, y ``[N, W]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from hf_glu.activation.blocks import differentiable, fusible, rows_of, split
from hf_glu.activation.mixing import Kernel, aten, by_autograd, kernel_of
from hf_glu.functional import gated

# torch's kernels of what Transformers writes as a formula: other bits, so that gradients only are made with them
ROUNDED = {
    NewGELUActivation: Kernel(
        lambda x, y: aten.gelu.out(x, approximate="tanh", out=y),
        lambda d, x, y, out: aten.gelu_backward.grad_input(d, x, approximate="tanh", grad_input=out),
    )
}
ALIGNED = 32  # elements of the widest vector
SIZE = 2**20  # elements of a block for each thread: with few operations, starting them costs more than a cache's misses


def gate(phi: nn.Module, x: Tensor, *, contiguous: bool) -> Tensor:
    """Return phi(g) * u of ``x`` ``[..., 2 W]``.

    ``contiguous``: phi gives other bits for a view than for a copy, and is to be given a copy.
    """
    # a leaf is no projection's: experts compute their activations again themselves, and once is enough
    lean = torch.is_grad_enabled() and x.requires_grad and not x.is_leaf and x.shape[-1] % 2 == 0 and fusible(x)
    if not lean or any(True for _ in phi.parameters()):
        return gated(x, phi, contiguous=contiguous)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = Gate.apply(phi, contiguous, rows).view(*x.shape[:-1], x.shape[-1] // 2)
    y._hf_glu_product = Product(phi, contiguous, rows.detach())  # type: ignore[attr-defined]
    return y


@dataclass(frozen=True, eq=False)
class Product:
    """What a product phi(g) u is made of; called, it is computed again: ``[N, W]``."""

    phi: nn.Module
    contiguous: bool
    x: Tensor

    def __call__(self) -> Tensor:
        """Return the product."""
        return product(self.phi, self.contiguous, self.x)


def product_of(y: Any) -> Product | None:
    """Return what `gate` has made ``y`` of, None for any other tensor."""
    return getattr(y, "_hf_glu_product", None)


class Gate(torch.autograd.Function):
    """The product, block by block."""

    @staticmethod
    def forward(phi: nn.Module, contiguous: bool, x: Tensor) -> Tensor:
        """Return y."""
        return product(phi, contiguous, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep x."""
        ctx.phi, ctx.contiguous, x = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient; where it is to have gradients itself, by autograd."""
        (d,), (x,) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, *differentiable(ctx, gated(x, ctx.phi, contiguous=ctx.contiguous), (x,), d)
        phi, width, rows = ctx.phi, d.shape[1], _rows(x)
        kernel = kernel_of(phi) or ROUNDED.get(type(phi))
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        buffers = x.new_empty(2, rows, width)
        for x_b, d_b, dx_b in split(rows, x, d, dx):
            (g, u), (dg, du) = x_b.split(width, 1), dx_b.split(width, 1)
            value, slope = buffers[:, : len(x_b)]
            torch.mul(d_b, u, out=slope)
            if kernel:
                kernel.value(g, value)
                torch.mul(d_b, value, out=du)
                kernel.slope(slope, g, value, dg)
            else:
                opened, grown = by_autograd(phi, g, slope)
                torch.mul(d_b, opened, out=du)
                dg.copy_(grown)
        return None, None, dx


@torch.no_grad()
def product(phi: nn.Module, contiguous: bool, x: Tensor) -> Tensor:
    """Return y of ``x``."""
    kernel, width, rows = kernel_of(phi), x.shape[1] // 2, _rows(x)
    y = x.new_empty(len(x), width)
    buffer = x.new_empty(rows, width) if contiguous else None
    for x_b, y_b in split(rows, x, y):
        g, u = x_b.split(width, 1)
        if buffer is not None:
            g = buffer[: len(x_b)].copy_(g)
        if kernel:
            kernel.value(g, y_b)
            y_b.mul_(u)
        else:
            torch.mul(phi(g), u, out=y_b)
    return y


def _rows(x: Tensor) -> int:
    """Return the rows of a block: whole vectors, whose last elements torch computes in another way, by an ulp."""
    return -(-rows_of(x, SIZE) // ALIGNED) * ALIGNED
