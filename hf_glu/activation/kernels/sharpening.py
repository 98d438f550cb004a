"""z = g + a r g, the sharpened gate of ``kappa_N``, in few passes over ``[N, W]``; see `hf_glu.activation.kappa`.

With d the gradient of z and p = d g:  dg = d + a r d,  dr = p a,  da = r p. Autograd takes about twice as many passes.

Shapes: N rows, W units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_glu.activation.kernels.autodiff import differentiable, needs_formula


def sharpen(gate: Tensor, scores: Tensor, response: Tensor) -> Tensor:
    """Return g + a r g of gates ``[..., W]``, scores r ``[...]`` and a, which is ``[W]`` or one for each row.

    It is no g (1 + a r), which bfloat16 would round to g for any small a.
    """
    alone = gate.ndim == 2 and scores.ndim == response.ndim == 1  # one expert's rows
    fast = alone and not needs_formula(gate, scores, response)
    z: Tensor = Sharpen.apply(gate, scores, response) if fast else _formula(gate, scores, response)
    return z


def _formula(gate: Tensor, scores: Tensor, response: Tensor) -> Tensor:
    return torch.addcmul(gate, gate * scores.unsqueeze(-1), response)


class Sharpen(torch.autograd.Function):
    """The same for one expert's rows, with its own gradient."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, scores: Tensor, response: Tensor) -> Tensor:
        """Return z, and keep what it is made of."""
        ctx.save_for_backward(gate, scores, response)
        z = gate * scores.unsqueeze(1)
        return torch.addcmul(gate, z, response, out=z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; where they are to have gradients themselves, or come in batches, by autograd."""
        (d,), (gate, scores, response) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled() or needs_formula(gate, d):
            return tuple(differentiable(_formula, (gate, scores, response), ctx.needs_input_grad, (d,)))
        p = d * gate
        d_scores, d_response = p @ response, scores @ p
        torch.mul(d, scores.unsqueeze(1), out=p)
        return torch.addcmul(d, p, response, out=p), d_scores, d_response
