"""Which modules compute exactly what their class says, so that they may be computed again or by other kernels.

A module of another class, with a hook, a forward of its own or a replaced function may draw random numbers, count its
calls or change its input in place: it is called as it is, once, under autograd.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

from torch import nn
from torch.nn import functional
from transformers import activations as stock

from hf_glu.compat.of_torch import has_global_hooks, has_hooks

# classes of Transformers, some of which older versions don't have
STOCK = (
    "AccurateGELUActivation", "ClippedGELUActivation", "FastGELUActivation", "GELUActivation", "GELUTanh",
    "LaplaceActivation", "LinearActivation", "MishActivation", "NewGELUActivation", "QuickGELUActivation",
    "ReLUSquaredActivation", "SiLUActivation", "SqrtSoftplusActivation",
)  # fmt: skip
# elementwise classes of torch and Transformers: one pure function of the input and of plain numbers
PURE: frozenset[type[nn.Module]] = frozenset(
    (
        nn.GELU,
        nn.Hardswish,
        nn.Identity,
        nn.LeakyReLU,
        nn.Mish,
        nn.ReLU,
        nn.ReLU6,
        nn.SiLU,
        nn.Sigmoid,
        nn.Softplus,
        nn.Tanh,
        *(kind for name in STOCK if (kind := getattr(stock, name, None))),
    )
)
FUNCTIONS = (functional.gelu, functional.mish)


def is_bare(module: nn.Module) -> bool:
    """Return whether calling ``module`` runs its class's forward and nothing else.

    A hook (torch's own, for all modules, too) or a forward of the instance's own (offloading, other kernels) adds to
    it; a parametrization changes the class, which the caller compares.
    """
    return "forward" not in module.__dict__ and not has_hooks(module) and not has_global_hooks()


def is_known(module: nn.Module) -> bool:
    """Return whether ``module`` is an elementwise function that is known exactly, and computes nothing else."""
    if type(module) not in PURE or getattr(module, "inplace", False) or not is_bare(module):
        return False
    own = (value for name, value in vars(module).items() if not name.startswith("_"))
    return all(_is_constant(module, value) for value in own)


def _is_constant(module: nn.Module, value: Any) -> bool:
    if isinstance(value, partial):
        return value.func is functional.gelu
    if isinstance(value, MethodType):
        return value.__self__ is module
    return value is None or isinstance(value, (int, float, str)) or value in FUNCTIONS
