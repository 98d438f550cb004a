"""The mathematics as pure functions.

Shapes: ``x`` is ``[..., 2 * width]`` = ``[g | u]``; ``g``, ``u`` and the results are ``[..., width]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_glu.errors import OptionError


def split_gate_up(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split ``[g | u]`` into its halves (views)."""
    if x.shape[-1] % 2:
        raise OptionError(f"a gated activation takes [gate | up], an even last dimension, got {tuple(x.shape)}")
    gate, up = x.chunk(2, dim=-1)  # not two slices, whose gradients are each of the size of both
    return gate, up


def gated(x: Tensor, phi: Callable[[Tensor], Tensor], *, contiguous: bool = False) -> Tensor:
    """Return phi(g) * u: the gated linear unit of any elementwise phi (Dauphin 2016; Shazeer 2020, arXiv 2002.05202).

    ``contiguous`` hands phi a copy of the gate half instead of a view. The up half is then copied, too, where there
    will be a gradient: a view of it would keep both.
    """
    gate, up = split_gate_up(x)
    if not contiguous:
        return phi(gate) * up
    copied = torch.is_grad_enabled() and not torch.jit.is_tracing()  # whose graph is for both
    return phi(gate.contiguous()) * (up.contiguous() if copied else up)
