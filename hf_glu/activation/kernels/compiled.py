"""What torch's compiler makes of a formula: one pass forward, one backward, instead of one for each operation.

A kernel is made when it is first needed, and kept on disk by torch (``TORCHINDUCTOR_CACHE_DIR``). It belongs to the
classes of a formula's elementwise functions, so that all layers share it. Inside, numbers are float32 where inputs are
halves. Value and gradient are two functions without autograd; who calls them is an autograd function of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
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
from hf_glu.compat.of_torch import COMPILER, NO_COMPILER, aten

Kind = Callable[[], nn.Module]


def kind_of(phi: nn.Module) -> Kind:
    """Return the class of phi."""
    return type(phi)


@cache
def has_compiler(device: str) -> bool:
    """Return whether torch's compiler can make kernels for a type of device."""
    if device != "cpu":
        return bool(find_spec("triton"))
    try:
        return bool(COMPILER.find()())
    except NO_COMPILER.find():
        return False


def compile_formula(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function, compiled for inputs of any size when it is first called."""
    # torch counts recompilations by code, and gives up after a few: each function gets a code of its own
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__)
    made: Callable[..., Any] = torch.compile(own, dynamic=True)
    return made


def is_standard(phi: nn.Module) -> bool:
    """Return whether phi is known exactly, and has the constants that its class has by default."""
    return is_known(phi) and _constants(phi) == _default_constants(kind_of(phi))


@cache
def _default_constants(kind: Kind) -> list[str] | None:
    try:
        return _constants(kind())
    except TypeError:  # it takes arguments
        return None


def _constants(phi: nn.Module) -> list[str]:
    own = ((name, value) for name, value in vars(phi).items() if not name.startswith("_") and name != "training")
    return [f"{name}={getattr(value, '__func__', value)}" for name, value in own]


@dataclass(frozen=True)
class Compiled:
    """A formula's value and its gradient, each one pass; given without autograd."""

    value: Callable[..., Any]
    gradient: Callable[..., Any]


def wide(x: Tensor) -> Tensor:
    """Return x in float32, or float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def detached(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return tensors without their graphs, which a compiler would ask about."""
    return [None if tensor is None else tensor.detach() for tensor in tensors]


def has_kernels(functions: Iterable[nn.Module], device: str) -> bool:
    """Return whether formulas of these elementwise functions, and their gradients, can be compiled for a device."""
    return has_compiler(device) and all(type(function) in SLOPES and is_standard(function) for function in functions)


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
SLOPES: dict[Kind, Callable[[Tensor, Tensor], Tensor]] = {
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
