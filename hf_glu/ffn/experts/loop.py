"""Experts one after the other, with a backward pass that keeps little; and the rows that a token's experts share.

Shapes: N token-expert pairs sorted by expert, T tokens, k experts a token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_glu.activation.context.confidence import Confidence
from hf_glu.activation.kernels.autodiff import differentiable, needs_formula
from hf_glu.activation.kernels.spans import spans_of


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int, out: Tensor | None = None) -> Tensor:
    """Return x W_e^T + b_e, in ``out`` where it is given."""
    result = torch.mm(x, weight[expert].T, out=out)
    return result if bias is None else result.add_(bias[expert])


def plain_loop(
    act: nn.Module,
    sizes: Sequence[int],
    x: Tensor,
    scale: Tensor,
    in_proj: Tensor,
    out_proj: Tensor,
    in_bias: Tensor | None,
    out_bias: Tensor | None,
    scores: Tensor | None = None,
    response: Tensor | None = None,
) -> Tensor:
    """Return y = scale out_e(act(in_e(x))) by operations that autograd follows, whatever the activation is.

    Experts without a row take part: their weights have gradients of 0, which DDP waits for.

    Args:
        act: the activation.
        sizes: how many rows each expert has.
        x, scale, in_proj, out_proj, in_bias, out_bias: as of `hf_glu.ffn.experts.group.Bank`.
        scores: what the router gave each row ``[N]``, where the activation is told; None: it isn't.
        response: the activation's a ``[E, W]`` (`hf_glu.activation.kappa`); None: those that it has.
    """
    none = [None] * len(sizes)
    weights = (in_proj.unbind(), out_proj.unbind())
    optional = (none if each is None else each.unbind() for each in (in_bias, out_bias, response))
    said = none if scores is None else scores.split(list(sizes))
    parts, each = [], zip(x.split(list(sizes)), *weights, *optional, said, strict=True)
    for expert, (rows, into, out, into_bias, out_of_bias, own, given) in enumerate(each):
        heard = (Confidence(given, expert, own),) if given is not None else ()
        hidden = act(functional.linear(rows, into, into_bias), *heard).to(x.dtype)
        parts.append(functional.linear(hidden, out, out_of_bias))
    return torch.cat(parts) * scale.unsqueeze(1)


class ExpertLoop(torch.autograd.Function):
    """The same, keeping only x and z = in_e(x): the backward pass computes h = act(z) again.

    The activation is one that is known exactly (`kernels.known`) and has no parameters, but for those of a ``kappa_``
    one, which it is given, like the scores that they multiply. With d the gradient
    of y: that of h is scale out_e^T d, of out_e scale d h^T, and of scale (out_e^T d) . h, to which the bias b of out_e
    adds b . d. Expert by expert, what is computed from z stays small enough for the caches.
    """

    @staticmethod
    def forward(ctx: Any, act: nn.Module, sizes: Sequence[int], *tensors: Any) -> Tensor:
        x, scale, in_proj, out_proj, in_bias, out_bias, *heard = tensors
        kind = x.device.type
        ctx.act, ctx.sizes = act, sizes
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        z = x.new_empty(len(x), in_proj.shape[1])
        y = x.new_empty(len(x), out_proj.shape[1], dtype=torch.promote_types(x.dtype, scale.dtype))
        for expert, rows in spans_of(sizes):
            h = act(linear(x[rows], in_proj, in_bias, expert, z[rows]), *_said(heard, expert, rows)).to(x.dtype)
            torch.mul(linear(h, out_proj, out_bias, expert), scale[rows].unsqueeze(1), out=y[rows])
        ctx.save_for_backward(z, *tensors)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled() or needs_formula(gradient):
            formula = partial(plain_loop, ctx.act, ctx.sizes)
            return None, None, *differentiable(formula, tensors, ctx.needs_input_grad[2:], (gradient,))
        x, scale, in_proj, out_proj, _, out_bias, *heard = tensors
        spans = spans_of(ctx.sizes)
        make = torch.empty_like if len(spans) == len(in_proj) else torch.zeros_like  # 0, not None, for DDP
        made = [make(tensor) if need else None for tensor, need in zip(tensors, ctx.needs_input_grad[2:], strict=True)]
        d_x, d_scale, d_in, d_out, d_in_bias, d_out_bias, *d_heard = made
        for expert, rows in spans:
            leaves, h = _activate(ctx, z[rows], x.dtype, _said(heard, expert, rows))
            weight, d = scale[rows].unsqueeze(1), gradient[rows].to(x.dtype)
            d_h = d @ out_proj[expert]
            if d_scale is not None:
                d_scale[rows] = (d_h * h.detach()).sum(1, dtype=scale.dtype)
                if out_bias is not None:
                    d_scale[rows] += (d * out_bias[expert]).sum(1, dtype=scale.dtype)
            d = (gradient[rows] * weight).to(x.dtype)
            d_z, *found = torch.autograd.grad(h, leaves, d_h.mul_(weight))
            for whole, part, place in zip(d_heard, found, (rows, slice(expert, expert + 1)), strict=False):
                if whole is not None:
                    whole[place] = part
            for weights, biases, left, right in ((d_out, d_out_bias, d, h.detach()), (d_in, d_in_bias, d_z, x[rows])):
                if weights is not None:
                    torch.mm(left.T, right, out=weights[expert])
                if biases is not None:
                    torch.sum(left, 0, out=biases[expert])
            if d_x is not None:
                torch.mm(d_z, in_proj[expert], out=d_x[rows])
        return None, None, *made


def _said(heard: Sequence[Tensor], expert: int, rows: slice) -> tuple[Confidence, ...]:
    """Return what an activation is told of an expert's rows, of scores ``[N]`` and a ``[E, W]``, or of nothing."""
    return (Confidence(heard[0][rows], expert, heard[1][expert]),) if heard else ()


def _activate(
    ctx: Any, z: Tensor, dtype: torch.dtype, said: tuple[Confidence, ...]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return z, and what it is told, as leaves, and act(z) computed from them as in the forward pass."""
    told = [part for each in said for part in (each.scores, each.response) if isinstance(part, Tensor)]
    z, *told = leaves = tuple(part.detach().requires_grad_() for part in (z, *told))
    kind, to, enabled = ctx.autocast
    with torch.enable_grad(), torch.autocast(kind, dtype=to, enabled=enabled):
        return leaves, ctx.act(z, *((Confidence(told[0], 0, told[1]),) if told else ())).to(dtype)


def dispatch(x: Tensor, source: Tensor, back: Tensor) -> Tensor:
    """Copy rows to where they are used; see `Dispatch`."""
    return x.index_select(0, source) if needs_formula(x) else Dispatch.apply(x, source, back)


def combine(x: Tensor, source: Tensor, back: Tensor) -> Tensor:
    """Sum the rows that belong together; see `Combine`."""
    return x[back].sum(1) if needs_formula(x) else Combine.apply(x, source, back)


class Dispatch(torch.autograd.Function):
    """Copy rows to where they are used: row i of the result is row ``source[i]`` of x.

    Shapes: x ``[T, H]``, source ``[T k]``, back ``[T, k]`` (where the copies of a row of x are), result ``[T k, H]``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, back: Tensor) -> Tensor:
        """Copy the rows."""
        ctx.save_for_backward(source, back)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Sum the copies' gradients."""
        return combine(gradients[0], *ctx.saved_tensors), None, None


class Combine(torch.autograd.Function):
    """Sum the rows that belong together, the adjoint of `Dispatch`: row t of the result is sum_j x[back[t, j]]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, back: Tensor) -> Tensor:
        """Sum the rows."""
        ctx.save_for_backward(source, back)
        return sum_rows(x, back)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Copy the gradient to the rows."""
        return dispatch(gradients[0], *ctx.saved_tensors), None, None


def sum_rows(x: Tensor, back: Tensor) -> Tensor:
    """Return sum_j x[back[:, j]]: as fast as a gather and a sum, or an indexed addition, or several times as fast."""
    first, *rest = back.unbind(1)
    total = x.index_select(0, first)
    for rows in rest:
        total += x.index_select(0, rows)
    return total
