"""Formulas that aren't phi(g) * u; they only use tensors' own methods, so that a listing has them without torch.

Shapes: ``g``, ``u`` and the results are ``[..., width]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

OSS_SLOPE = 1.702
OSS_LIMIT = 7.0


def swiglu_oss(gate: Tensor, up: Tensor) -> Tensor:
    """Return g' sigmoid(1.702 g') (u' + 1), g' = min(g, 7), u' = clamp(u, -7, 7): the gate of gpt-oss."""
    gate = gate.clamp(max=OSS_LIMIT)
    up = up.clamp(min=-OSS_LIMIT, max=OSS_LIMIT)
    return gate * (OSS_SLOPE * gate).sigmoid() * (up + 1)


def dreglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return relu(g) relu(u): a unit is closed where either half is (TurboSparse, https://arxiv.org/abs/2406.05955)."""
    return gate.relu() * up.relu()


FORMULAS = (swiglu_oss, dreglu)
