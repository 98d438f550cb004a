"""phi(g) * u and its gradient in one pass each: Liger's kernels, or what torch's compiler makes of the formula.

Which there are depends on the device; where there is none, the plain way goes on (`hf_glu.activation.products`).

Shapes: x ``[..., 2 W]`` = ``[g | u]``, y and d ``[..., W]``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from hf_glu.activation.elementwise import build_elementwise, same_function
from hf_glu.activation.gating import Fused


@cache
def find_fused(name: str, device: str) -> Fused | None:
    """Return the kernels of phi's ``name`` on a type of device: Liger's where it has them, else compiled ones."""
    found = (make(name, device) for make in (_liger, _compiled))
    return next((fused for fused in found if fused), None)


def has_compiler(device: str) -> bool:
    """Tell whether torch's compiler can make kernels for a type of device."""
    if device != "cpu":
        return bool(find_spec("triton"))
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def _compiled(name: str, device: str) -> Fused | None:
    if not has_compiler(device):
        return None
    phi = build_elementwise(name)

    def value(x: Tensor) -> Tensor:
        g, u = x.chunk(2, -1)
        y: Tensor = phi(g) * u
        return y

    # two views of one tensor: written to as a whole, each element would be computed for both halves
    def gradient(g: Tensor, u: Tensor, d: Tensor) -> None:
        opened, pull, *_ = torch.func.vjp(phi, g)
        du = d * opened
        g.copy_(pull(d * u)[0])
        u.copy_(du)

    over = _compile(gradient)
    return Fused(lambda x, d: over(*_rows(x).chunk(2, -1), _rows(d)), None if device == "cpu" else _compile(value))


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # torch counts recompilations by code, and gives up after a few: each function gets a code of its own
    own = FunctionType(function.__code__.replace(), globals(), function.__name__, None, function.__closure__)
    made: Callable[..., Any] = torch.compile(own, dynamic=True)
    return made


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _liger(name: str, device: str) -> Fused | None:
    """Return what https://github.com/linkedin/Liger-Kernel has."""
    if device != "cuda" or not find_spec("liger_kernel"):
        return None
    if same_function(name, "silu"):
        return liger_silu()
    return liger_gelu() if same_function(name, "gelu_new") else None


def liger_silu() -> Fused | None:
    """Return Liger's kernels of swiglu for ``[g | u]``, which its versions have from 0.8.5 on."""
    ops = import_module("liger_kernel.ops.swiglu")
    value, gradient = (getattr(ops, f"swiglu_fused_gate_up_{way}", None) for way in ("forward", "backward"))
    if not value or not gradient:
        return None
    return Fused(lambda x, d: gradient(x, d.contiguous(), True), lambda x: value(x)[1])


def liger_gelu() -> Fused:
    """Return Liger's kernels of tanh GELU, which take the halves one by one, contiguous."""
    ops = import_module("liger_kernel.ops.geglu")

    def halves(x: Tensor) -> list[Tensor]:
        return [half.contiguous() for half in x.chunk(2, -1)]

    def over(x: Tensor, d: Tensor) -> None:
        torch.cat(ops.geglu_backward(*halves(x), d.contiguous()), -1, out=x)

    return Fused(over, lambda x: ops.geglu_forward(*halves(x))[2])
