"""phi(g) * u and its gradient in one pass each: Liger's kernels, or what torch's compiler makes of the formula.

Which there are depends on the device; where there is none, the plain way goes on.

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
from torch import Tensor, nn
from transformers.activations import (
    GELUActivation,
    GELUTanh,
    LinearActivation,
    NewGELUActivation,
    QuickGELUActivation,
    ReLUSquaredActivation,
    SiLUActivation,
)

from hf_glu.activation.kernels.known import is_known
from hf_glu.activation.kernels.product import Fused
from hf_glu.compat.of_torch import COMPILER, NO_COMPILER, aten


def find_fused(phi: nn.Module, device: str) -> Fused | None:
    """Return the kernels of phi(g) * u on a type of device: Liger's where it has them, else compiled ones.

    None where phi isn't exactly what its class makes of no arguments, or where there are no kernels.
    """
    kind: Callable[[], nn.Module] = type(phi)
    return _kernels(kind, device) if is_standard(phi) else None


def is_standard(phi: nn.Module) -> bool:
    """Return whether phi is known exactly, and has the constants that its class has by default."""
    kind: Callable[[], nn.Module] = type(phi)
    return is_known(phi) and _constants(phi) == _default_constants(kind)


@cache
def _default_constants(kind: Callable[[], nn.Module]) -> list[str] | None:
    try:
        return _constants(kind())
    except TypeError:  # it takes arguments
        return None


def _constants(phi: nn.Module) -> list[str]:
    own = ((name, value) for name, value in vars(phi).items() if not name.startswith("_") and name != "training")
    return [f"{name}={getattr(value, '__func__', value)}" for name, value in own]


@cache
def _kernels(kind: Callable[[], nn.Module], device: str) -> Fused | None:
    found = (make(kind, device) for make in (_liger, _compiled))
    return next((fused for fused in found if fused), None)


def has_compiler(device: str) -> bool:
    """Return whether torch's compiler can make kernels for a type of device."""
    if device != "cpu":
        return bool(find_spec("triton"))
    try:
        return bool(COMPILER.find()())
    except NO_COMPILER.find():
        return False


def _silu(d: Tensor, g: Tensor) -> Tensor:
    opened = g.sigmoid()
    return d * opened * (1 + g * (1 - opened))


def _sigmoid(d: Tensor, g: Tensor, slope: float = 1.0) -> Tensor:
    opened = torch.sigmoid(slope * g)
    return d * slope * opened * (1 - opened)


def _quick_gelu(d: Tensor, g: Tensor) -> Tensor:
    return d * torch.sigmoid(QUICK * g) + g * _sigmoid(d, g, QUICK)


def _tanh_gelu(d: Tensor, g: Tensor) -> Tensor:
    return aten.gelu_backward(d, g, approximate="tanh")


QUICK = 1.702
# d phi'(g) by the class of phi; not by torch.func.vjp, which can't be traced where somebody packs saved tensors
SLOPES: dict[Callable[[], nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    nn.SiLU: _silu,
    SiLUActivation: _silu,
    GELUActivation: lambda d, g: aten.gelu_backward(d, g),
    NewGELUActivation: _tanh_gelu,
    GELUTanh: _tanh_gelu,
    QuickGELUActivation: _quick_gelu,
    LinearActivation: lambda d, g: d,
    nn.ReLU: lambda d, g: torch.where(g > 0, d, 0),
    ReLUSquaredActivation: lambda d, g: 2 * d * g.relu(),
    nn.Sigmoid: _sigmoid,
    nn.Tanh: lambda d, g: d * (1 - g.tanh().square()),
}


def _compiled(kind: Callable[[], nn.Module], device: str) -> Fused | None:
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

    compiled = _compile(gradient)
    return Fused(fill, None if device == "cpu" else _compile(value))


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # torch counts recompilations by code, and gives up after a few: each function gets a code of its own
    own = FunctionType(function.__code__.replace(), globals(), function.__name__, None, function.__closure__)
    made: Callable[..., Any] = torch.compile(own, dynamic=True)
    return made


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _liger(kind: Callable[[], nn.Module], device: str) -> Fused | None:
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
