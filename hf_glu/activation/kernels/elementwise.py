"""torch's own kernels of elementwise functions, writing into tensors that are given.

The class of a module that is known exactly decides (`hf_glu.activation.kernels.known`), never a name or an attribute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import GELUActivation, NewGELUActivation, SiLUActivation

from hf_glu.activation.kernels.known import is_known
from hf_glu.compat.of_torch import aten, has_operators

_HAVE = has_operators()  # else the formula stays


@dataclass(frozen=True)
class Kernel:
    """torch's own kernels of a function.

    Attributes:
        value: fills its second argument with y = phi(x).
        slope: fills its last argument, which may be y, with d phi'(x), from d, x and y.
    """

    value: Callable[[Tensor, Tensor], object]
    slope: Callable[[Tensor, Tensor, Tensor, Tensor], object]


def _gelu(approximate: str) -> Kernel:
    return Kernel(
        lambda x, y: aten.gelu.out(x, approximate=approximate, out=y),
        lambda d, x, y, out: aten.gelu_backward.grad_input(d, x, approximate=approximate, grad_input=out),
    )


_SILU = Kernel(
    lambda x, y: aten.silu.out(x, out=y), lambda d, x, y, out: aten.silu_backward.grad_input(d, x, grad_input=out)
)
_RELU = Kernel(
    lambda x, y: torch.clamp_min(x, 0, out=y),
    lambda d, x, y, out: aten.threshold_backward.grad_input(d, y, 0, grad_input=out),
)
_TANH = Kernel(
    lambda x, y: torch.tanh(x, out=y), lambda d, x, y, out: aten.tanh_backward.grad_input(d, y, grad_input=out)
)
_SIGMOID = Kernel(
    lambda x, y: torch.sigmoid(x, out=y), lambda d, x, y, out: aten.sigmoid_backward.grad_input(d, y, grad_input=out)
)
_KERNELS: dict[type[nn.Module], Kernel] = {
    nn.SiLU: _SILU,
    SiLUActivation: _SILU,
    GELUActivation: _gelu("none"),
    nn.ReLU: _RELU,
    nn.Tanh: _TANH,
    nn.Sigmoid: _SIGMOID,
}
# of what Transformers writes as a formula: other bits, so that only gradients are made with them
_ROUNDED: dict[type[nn.Module], Kernel] = {NewGELUActivation: _gelu("tanh")}


def kernel_of(phi: nn.Module) -> Kernel | None:
    """Return the kernels that give the bits of an elementwise module, None where there are none."""
    if not _HAVE or not is_known(phi) or (type(phi) is GELUActivation and phi.act is not functional.gelu):
        return None
    return _KERNELS.get(type(phi))


def gradient_kernel_of(phi: nn.Module) -> Kernel | None:
    """Return the kernels that give an elementwise module's gradient, up to rounding."""
    return kernel_of(phi) or (_ROUNDED.get(type(phi)) if _HAVE and is_known(phi) else None)
