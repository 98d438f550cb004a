"""phi(g) * u with a gradient that keeps ``[g | u]`` only, and computes phi again.

The gradients are written over ``[g | u]`` where nothing else can see that: fresh memory costs more than the arithmetic.

Shapes: x ``[..., 2 W]`` = ``[g | u]``, y ``[..., W]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.blocks import differentiable, fusible
from hf_glu.activation.mixing import kernel_of
from hf_glu.activation.ownership import is_sole_owner
from hf_glu.activation.products import by_layout, fill_gradient, product
from hf_glu.functional import gated


@dataclass(frozen=True)
class Fused:
    """A gated activation's kernels, each one pass (`hf_glu.activation.fused`).

    Attributes:
        gradient: writes ``[dg | du]`` over its first argument x, given d.
        value: returns y of x; None: the plain way is as fast, and keeps the bits.
    """

    gradient: Callable[[Tensor, Tensor], object]
    value: Callable[[Tensor], Tensor] | None = None


def gate(phi: nn.Module, x: Tensor, *, contiguous: bool, fused: Fused | None = None) -> Tensor:
    """Return phi(g) * u of ``x`` ``[..., 2 W]``.

    ``contiguous``: phi gives other bits for a view than for a copy, and is to be given a copy. ``fused``: what computes
    the same in one pass.
    """
    contiguous = contiguous and by_layout(phi, x)
    # a leaf is no projection's: experts compute their activations again themselves, and once is enough
    lean = torch.is_grad_enabled() and x.requires_grad and not x.is_leaf and x.shape[-1] % 2 == 0 and fusible(x)
    if not lean or any(True for _ in phi.parameters()):
        return gated(x, phi, contiguous=contiguous)
    x = x.contiguous()
    memo = Memo() if kernel_of(phi) and not fused else None
    y: Tensor = Gate.apply(phi, contiguous, fused, memo, x)
    y._hf_glu_product = Product(phi, contiguous, memo, x.detach())  # type: ignore[attr-defined]
    return y


@dataclass
class Memo:
    """What a product computed again leaves for its gradient.

    Attributes:
        opened: phi(g).
    """

    opened: Tensor | None = None

    def take(self) -> Tensor | None:
        """Return it, once."""
        opened, self.opened = self.opened, None
        return opened


@dataclass(frozen=True, eq=False)
class Product:
    """What a product phi(g) u is made of; called, it is computed again."""

    phi: nn.Module
    contiguous: bool
    memo: Memo | None
    x: Tensor

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the product."""
        x = self.x
        opened = None
        if self.memo:
            self.memo.opened = opened = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
        return product(self.phi, self.contiguous, x, opened)


def product_of(y: Any) -> Product | None:
    """Return what `gate` has made ``y`` of, None for any other tensor."""
    return getattr(y, "_hf_glu_product", None)


class Gate(torch.autograd.Function):
    """The product, with its own gradient."""

    # Without ``setup_context``, for which torch binds the arguments by their signature at each call: 0.2 ms.

    @staticmethod
    def forward(
        ctx: Any, phi: nn.Module, contiguous: bool, fused: Fused | None, memo: Memo | None, x: Tensor
    ) -> Tensor:
        """Return y, and keep x."""
        ctx.phi, ctx.contiguous, ctx.fused, ctx.memo = phi, contiguous, fused, memo
        ctx.save_for_backward(x)
        return fused.value(x) if fused and fused.value else product(phi, contiguous, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient; where it is to have gradients itself, by autograd."""
        (x,), (d,) = ctx.saved_tensors, gradients
        opened = ctx.memo and ctx.memo.take()
        if torch.is_grad_enabled():
            y = gated(x, ctx.phi, contiguous=ctx.contiguous)
            return None, None, None, None, *differentiable(ctx, y, (x,), d)
        own = is_sole_owner(x)
        if ctx.fused:
            dx = x.detach() if own else x.clone()
            ctx.fused.gradient(dx, d)
        else:
            dx = x.detach() if own else torch.empty_like(x)
            fill_gradient(ctx.phi, ctx.contiguous, x, d, dx, opened)
        return None, None, None, None, dx
