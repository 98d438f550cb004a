"""z = g + a r g, the sharpened gate of ``kappa_N``, in few passes over ``[N, W]``; see `hf_glu.activation.kappa`.

With d the gradient of z and p = d g:  dg = d + a r d,  dr = p a,  da = r p. Autograd takes about twice as many passes.

Shapes: N rows, E experts, W units.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_glu.activation.kernels.autodiff import differentiable, needs_formula
from hf_glu.activation.kernels.spans import spans_of


def sharpen(gate: Tensor, scores: Tensor, response: Tensor, experts: Tensor | None = None) -> Tensor:
    """Return g + a r g of gates ``[..., W]``, scores r ``[...]`` and a.

    It is no g (1 + a r), which bfloat16 would round to g for any small a.

    Args:
        gate: g.
        scores: r.
        response: a, ``[W]`` or one for each row; with ``experts``, ``[E, W]``.
        experts: which expert's each row is ``[N]``.
    """
    sizes = rows_of_each(gate, scores, response, experts)
    z: Tensor = Sharpen.apply(gate, scores, response, sizes) if sizes else _formula(gate, scores, response, experts)
    return z


def _formula(gate: Tensor, scores: Tensor, response: Tensor, experts: Tensor | None) -> Tensor:
    own = response if experts is None else functional.embedding(experts, response)
    return torch.addcmul(gate, gate * scores.unsqueeze(-1), own)


def rows_of_each(gate: Tensor, scores: Tensor, response: Tensor, experts: Tensor | None) -> list[int]:
    """Return how many rows each expert has; none where their rows aren't one after the other, or need the formula."""
    if gate.ndim != 2 or scores.ndim != 1 or needs_formula(gate, scores, response):
        return []
    if experts is None:
        return [len(gate)] if response.ndim == 1 else []
    if gate.device.type != "cpu" or bool((experts.diff() < 0).any()):  # elsewhere, counting would wait for the device
        return []
    counts: list[int] = torch.bincount(experts, minlength=len(response)).tolist()
    return counts


class Sharpen(torch.autograd.Function):
    """The same, one expert's rows after the other, with its own gradient: what is read again is still in the caches."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, scores: Tensor, response: Tensor, sizes: list[int]) -> Tensor:
        """Return z, and keep what it is made of."""
        ctx.save_for_backward(gate, scores, response)
        ctx.sizes, z = sizes, torch.empty_like(gate)
        each = response.view(len(sizes), -1)
        for expert, rows in spans_of(sizes):
            part = torch.mul(gate[rows], scores[rows].unsqueeze(1), out=z[rows])
            torch.addcmul(gate[rows], part, each[expert], out=part)
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; where they are to have gradients themselves, or come in batches, by autograd."""
        (d,), (gate, scores, response) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled() or needs_formula(gate, d):
            counts = torch.tensor(ctx.sizes, device=gate.device)
            experts = None if response.ndim == 1 else torch.repeat_interleave(counts)
            formula, inputs = partial(_formula, experts=experts), (gate, scores, response)
            return *differentiable(formula, inputs, ctx.needs_input_grad[:3], (d,)), None
        d_gate, d_scores, d_response = torch.empty_like(gate), torch.empty_like(scores), torch.zeros_like(response)
        each, d_each = (part.view(len(ctx.sizes), -1) for part in (response, d_response))
        for expert, rows in spans_of(ctx.sizes):
            p = torch.mul(d[rows], gate[rows], out=d_gate[rows])
            torch.mv(p, each[expert], out=d_scores[rows])
            torch.mv(p.T, scores[rows], out=d_each[expert])
            torch.mul(d[rows], scores[rows].unsqueeze(1), out=p)
            torch.addcmul(d[rows], p, each[expert], out=p)
        return d_gate, d_scores, d_response, None
