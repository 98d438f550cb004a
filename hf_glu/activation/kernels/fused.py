"""phi(g) * u and its gradient in one pass each: Liger's kernels, or what torch's compiler makes of the formula.

Which there are depends on the device; where there is none, the plain way goes on.

Shapes: x ``[..., 2 W]`` = ``[g | u]``, y and d ``[..., W]``.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, NewGELUActivation, SiLUActivation

from hf_glu.activation.kernels.compiled import SLOPES, Kind, compile_formula, has_compiler, is_standard, kind_of
from hf_glu.activation.kernels.product import Fused


def find_fused(phi: nn.Module, device: str) -> Fused | None:
    """Return the kernels of phi(g) * u on a type of device: Liger's where it has them, else compiled ones.

    None where phi isn't exactly what its class makes of no arguments, or where there are no kernels.
    """
    return _kernels(kind_of(phi), device) if is_standard(phi) else None


@cache
def _kernels(kind: Kind, device: str) -> Fused | None:
    found = (make(kind, device) for make in (_liger, _compiled))
    return next((fused for fused in found if fused), None)


def _compiled(kind: Kind, device: str) -> Fused | None:
    slope = SLOPES.get(kind)
    if slope is None or not has_compiler(device):
        return None
    phi = kind()

    def value(x: Tensor) -> Tensor:
        g, u = x.chunk(2, -1)
        y: Tensor = phi(g) * u
        return y

    # into halves one by one: written as a whole, each element would be computed for both
    def gradient(g: Tensor, u: Tensor, d: Tensor, dg: Tensor, du: Tensor) -> None:
        du.copy_(d * phi(g))
        dg.copy_(slope(d * u, g))

    def fill(x: Tensor, d: Tensor, dx: Tensor) -> None:
        compiled(*_rows(x).chunk(2, -1), _rows(d), *_rows(dx).chunk(2, -1))

    compiled = compile_formula(gradient)
    return Fused(fill, None if device == "cpu" else compile_formula(value))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _liger(kind: Kind, device: str) -> Fused | None:
    """Return what https://github.com/linkedin/Liger-Kernel has."""
    if device != "cuda" or not find_spec("liger_kernel"):
        return None
    if kind in (nn.SiLU, SiLUActivation):
        return liger_silu()
    return liger_gelu() if kind in (NewGELUActivation, GELUTanh) else None


def liger_silu() -> Fused | None:
    """Return Liger's kernels of swiglu for ``[g | u]``, which its versions have from 0.8.5 on."""
    ops = import_module("liger_kernel.ops.swiglu")
    value, gradient = (getattr(ops, f"swiglu_fused_gate_up_{way}", None) for way in ("forward", "backward"))
    if not value or not gradient:
        return None

    def fill(x: Tensor, d: Tensor, dx: Tensor) -> None:
        gradient(dx.copy_(x), d.contiguous(), True)  # which writes over what it is given

    return Fused(fill, lambda x: value(x)[1])


def liger_gelu() -> Fused:
    """Return Liger's kernels of tanh GELU, which take the halves one by one, contiguous."""
    ops = import_module("liger_kernel.ops.geglu")

    def halves(x: Tensor) -> list[Tensor]:
        return [half.clone(memory_format=torch.contiguous_format) for half in x.chunk(2, -1)]

    def fill(x: Tensor, d: Tensor, dx: Tensor) -> None:
        torch.cat(ops.geglu_backward(*halves(x), d.contiguous()), -1, out=dx)

    return Fused(fill, lambda x: ops.geglu_forward(*halves(x))[2])
