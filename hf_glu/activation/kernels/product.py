"""phi(g) * u that keeps ``[g | u]`` only and computes phi again in the backward pass, for `hf_glu.save_memory`.

With d the gradient of y:  dg = d u phi'(g),  du = d phi(g).

Shapes: x ``[..., 2 W]`` = ``[g | u]``, y and d ``[..., W]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.elementwise import OTHER_LIBRARY
from hf_glu.activation.kernels.autodiff import differentiable, needs_formula
from hf_glu.activation.kernels.elementwise import gradient_kernel_of
from hf_glu.activation.kernels.formulas import gated

VECTOR = 64  # elements that torch's kernels take at once at most; the last ones of fewer have other bits, by an ulp
PRODUCT = "_hf_glu_product"
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


@dataclass(frozen=True)
class Fused:
    """A gated activation's kernels, each one pass (`hf_glu.activation.kernels.fused`).

    Attributes:
        gradient: fills its last argument ``[dg | du]``, given x and d.
        value: returns y of x; None: the plain way is as fast, and keeps the bits.
    """

    gradient: Callable[[Tensor, Tensor, Tensor], object]
    value: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Product:
    """How a product phi(g) u was made of x; called, it makes it again.

    Attributes:
        stamp: the product's `fingerprint`.
    """

    phi: nn.Module
    contiguous: bool
    fused: Fused | None
    x: Tensor
    stamp: Tensor | None = None

    def is_unchanged(self, y: Tensor) -> bool:
        """Return whether ``y`` still holds what was made, bit by bit, whoever may have written into it."""
        return self.stamp is not None and torch.equal(self.stamp, fingerprint(y))

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the product."""
        if self.fused and self.fused.value:
            return self.fused.value(self.x)
        return gated(self.x, self.phi, contiguous=self.contiguous)


def fingerprint(y: Tensor) -> Tensor:
    """Return the sums of the bits of ``y`` ``[..., W]``, read as whole numbers, of each row and of each column.

    The numbers are of 8 bytes, several elements each, where rows divide into such: read as they are, without a copy.

    Versions of tensors aren't enough: who writes through ``.data`` or another library's view doesn't count as a change.
    Nor is one sum, which whoever swaps elements leaves as it is: two that are swapped change the sums of their rows,
    or, in one row, of their columns, or a number. What goes unseen adds up to 0 modulo 2^64 in every row and every
    column: four changes at the corners of a rectangle, at least, that cancel each other to the bit.
    """
    rows = y.detach().reshape(-1, y.shape[-1])
    whole = rows.is_contiguous() and all(n * y.element_size() % 8 == 0 for n in (y.shape[-1], rows.storage_offset()))
    words = rows.view(torch.int64 if whole else WORDS[y.element_size()])
    return torch.cat([words.sum(0, dtype=torch.int64), words.sum(1, dtype=torch.int64)])


def by_layout(phi: nn.Module, x: Tensor) -> bool:
    """Return whether phi of a view of half of ``x`` has other bits than phi of a copy."""
    if x.device.type != "cpu":
        return False
    if torch.compiler.is_compiling():  # which can't trace what follows
        return True
    return x.shape[-1] // 2 % (VECTOR * torch.get_num_threads()) != 0 or isinstance(phi, OTHER_LIBRARY)


def recomputed_gate(
    phi: nn.Module, x: Tensor, *, contiguous: bool, fused: Fused | None, stamped: bool = True
) -> Tensor:
    """Return phi(g) * u of ``x``; in the backward pass phi, which must be known exactly, is computed again.

    Args:
        phi: see `hf_glu.activation.kernels.known.is_known`.
        x: ``[..., 2 W]``.
        contiguous: hand phi a copy of its half.
        fused: what computes the same in one pass.
        stamped: whether an out-projection may ask how it was made (`product_of`).
    """
    y: Tensor = RecomputedGate.apply(phi, contiguous, fused, x)
    if stamped:
        setattr(y, PRODUCT, Product(phi, contiguous, fused, x.detach(), fingerprint(y)))
    return y


def product_of(y: Any) -> Product | None:
    """Return how `recomputed_gate` made ``y``, None for any other tensor."""
    return getattr(y, PRODUCT, None)


class RecomputedGate(torch.autograd.Function):
    """The product, with its own gradient."""

    @staticmethod
    def forward(ctx: Any, phi: nn.Module, contiguous: bool, fused: Fused | None, x: Tensor) -> Tensor:
        """Return y, and keep x."""
        ctx.phi, ctx.contiguous, ctx.fused = phi, contiguous, fused
        ctx.save_for_backward(x)
        return Product(phi, contiguous, fused, x)()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient; where it is to have gradients itself, or comes in batches, by autograd."""
        (x,), (d,) = ctx.saved_tensors, gradients
        if torch.is_grad_enabled() or needs_formula(x, d):

            def formula(x: Tensor) -> Tensor:
                return gated(x, ctx.phi, contiguous=ctx.contiguous)

            return None, None, None, *differentiable(formula, (x,), (True,), (d,))
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        if ctx.fused:
            ctx.fused.gradient(x.detach(), d.detach(), dx)
        else:
            fill_gradient(ctx.phi, ctx.contiguous, x, d, dx)
        return None, None, None, dx


def fill_gradient(phi: nn.Module, contiguous: bool, x: Tensor, d: Tensor, dx: Tensor) -> None:
    """Fill ``dx`` by torch's kernels of phi, or, where there are none, by autograd."""
    kernel, (g, u), (dg, du) = gradient_kernel_of(phi), x.chunk(2, -1), dx.chunk(2, -1)
    g = g.contiguous() if contiguous else g
    if kernel is None:
        with torch.enable_grad():
            leaf = g.detach().requires_grad_()
            opened = phi(leaf)
        (grown,) = torch.autograd.grad(opened, leaf, d * u, materialize_grads=True)
        dg.copy_(grown)
        torch.mul(d, opened.detach(), out=du)
        return
    opened = torch.empty_like(d, memory_format=torch.contiguous_format)
    kernel.value(g, opened)
    torch.mul(d, opened, out=du)
    kernel.slope(d * u, g, opened, dg)
