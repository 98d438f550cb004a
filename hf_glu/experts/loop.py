"""Experts one after the other, with a backward pass that keeps little; and the rows that a token's experts share.

Shapes: N token-expert pairs sorted by expert, T tokens, k experts a token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Spans = list[tuple[int, slice]]


def spans_of(sizes: Sequence[int]) -> Spans:
    """Return the experts that have rows, each with its rows."""
    ends = accumulate(sizes, initial=0)
    return [(expert, slice(*span)) for expert, span in enumerate(pairwise(ends)) if span[0] < span[1]]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int, out: Tensor | None = None) -> Tensor:
    """Return x W_e^T + b_e, in ``out`` where it is given."""
    result = torch.mm(x, weight[expert].T, out=out)
    return result if bias is None else result.add_(bias[expert])


class Loop(torch.autograd.Function):
    """y = scale out_e(act(in_e(x))), keeping only x and z = in_e(x): the backward pass computes h = act(z) again.

    With d the gradient of y: that of h is scale out_e^T d, of out_e scale d h^T, and of scale (out_e^T d) . h, to which
    the bias b of out_e adds b . d. Expert by expert, what is computed from z stays small enough for the caches.
    """

    @staticmethod
    def forward(ctx: Any, act: nn.Module, names: list[str], spans: Spans, *tensors: Any) -> Tensor:
        x, scale, in_proj, out_proj, in_bias, out_bias, *_ = tensors
        kind = x.device.type
        ctx.act, ctx.names, ctx.spans = act, names, spans
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        z = x.new_empty(len(x), in_proj.shape[1])
        y = x.new_empty(len(x), out_proj.shape[1], dtype=torch.promote_types(x.dtype, scale.dtype))
        for expert, rows in spans:
            h = act(linear(x[rows], in_proj, in_bias, expert, z[rows])).to(x.dtype)
            torch.mul(linear(h, out_proj, out_bias, expert), scale[rows].unsqueeze(1), out=y[rows])
        ctx.save_for_backward(z, *tensors)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, None, *_differentiable(ctx, gradient, tensors)
        x, scale, in_proj, out_proj, _, out_bias, *own = tensors
        make = torch.empty_like if len(ctx.spans) == len(in_proj) else torch.zeros_like  # 0, not None, for DDP
        made = [make(tensor) if need else None for tensor, need in zip(tensors, ctx.needs_input_grad[3:], strict=True)]
        d_x, d_scale, d_in, d_out, d_in_bias, d_out_bias, *d_own = made
        sums = [(total.zero_(), place) for place, total in enumerate(d_own) if total is not None]
        for expert, rows in ctx.spans:
            z_e, leaves, h = _activate(ctx, z[rows], own, x.dtype)
            weight, d = scale[rows].unsqueeze(1), gradient[rows].to(x.dtype)
            d_h = d @ out_proj[expert]
            if d_scale is not None:
                d_scale[rows] = (d_h * h.detach()).sum(1, dtype=scale.dtype)
                if out_bias is not None:
                    d_scale[rows] += (d * out_bias[expert]).sum(1, dtype=scale.dtype)
            d = (gradient[rows] * weight).to(x.dtype)
            d_z, *parts = torch.autograd.grad(h, (z_e, *leaves), d_h.mul_(weight), allow_unused=True)
            for weights, biases, left, right in ((d_out, d_out_bias, d, h.detach()), (d_in, d_in_bias, d_z, x[rows])):
                if weights is not None:
                    torch.mm(left.T, right, out=weights[expert])
                if biases is not None:
                    torch.sum(left, 0, out=biases[expert])
            if d_x is not None:
                torch.mm(d_z, in_proj[expert], out=d_x[rows])
            for total, place in sums:
                total += 0 if parts[place] is None else parts[place]
        return None, None, None, *made


def _activate(ctx: Any, z: Tensor, own: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return z and the activation's own parameters as leaves, and act(z) computed from them as in the forward pass."""
    z, leaves = z.detach().requires_grad_(), [parameter.detach().requires_grad_() for parameter in own]
    kind, to, enabled = ctx.autocast
    with torch.enable_grad(), torch.autocast(kind, dtype=to, enabled=enabled):
        named = dict(zip(ctx.names, leaves, strict=True))
        h = torch.func.functional_call(ctx.act, named, (z,)) if own else ctx.act(z)
        return z, leaves, h.to(dtype)


def _differentiable(ctx: Any, gradient: Tensor, tensors: list[Any]) -> list[Tensor | None]:
    """Return the gradients so that they have gradients themselves: the whole computation again, by autograd."""
    x, scale, in_proj, out_proj, in_bias, out_bias, *own = tensors
    named, parts = dict(zip(ctx.names, own, strict=True)), [x.new_empty(0, out_proj.shape[1])]
    for expert, rows in ctx.spans:
        z = functional.linear(x[rows], in_proj[expert], None if in_bias is None else in_bias[expert])
        h = torch.func.functional_call(ctx.act, named, (z,)).to(x.dtype)
        parts.append(functional.linear(h, out_proj[expert], None if out_bias is None else out_bias[expert]))
    y, needed = torch.cat(parts) * scale.unsqueeze(1), ctx.needs_input_grad[3:]
    wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needed]


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
        return Combine.apply(gradients[0], *ctx.saved_tensors), None, None


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
        return Dispatch.apply(gradients[0], *ctx.saved_tensors), None, None


def sum_rows(x: Tensor, back: Tensor) -> Tensor:
    """Return sum_j x[back[:, j]]: as fast as a gather and a sum, or an indexed addition, or several times as fast."""
    first, *rest = back.unbind(1)
    total = x.index_select(0, first)
    for rows in rest:
        total += x.index_select(0, rows)
    return total
