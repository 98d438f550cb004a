"""In which way torch follows what is computed, and gradients that can be followed themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.compat.of_torch import BATCHED, TRANSFORMS


def is_transformed(*tensors: Tensor | None) -> bool:
    """Return whether a transform of ``torch.func`` or a forward-mode derivative is at work.

    Batched gradients, such as those of a vectorized Jacobian, are one of the transforms.
    """
    if torch.compiler.is_compiling():  # which traces the transforms, too
        return False
    if TRANSFORMS.find()():
        return True
    given = [tensor for tensor in tensors if tensor is not None]
    if any(BATCHED.find()(tensor) for tensor in given):  # of batched gradients
        return True
    return any(torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None for tensor in given)


def needs_formula(*tensors: Tensor | None) -> bool:
    """Return whether torch follows the computation in a way that only plain operations support.

    So it is for compiling and tracing, for transforms, and for subclasses of tensors, which have rules of their own.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    given = [tensor for tensor in tensors if tensor is not None]
    if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type == "meta" for tensor in given):
        return True
    return is_transformed(*given)


def numbers(counts: Tensor | Sequence[int]) -> list[int]:
    """Return counts as a list; a tensor's within a transform one by one: torch 2.6 makes no list of it there."""
    if isinstance(counts, Tensor) and not is_transformed(counts):
        return counts.tolist()
    return [int(each) for each in counts]


def differentiable(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], needed: Sequence[bool], gradients: Sequence[Any]
) -> list[Tensor | None]:
    """Return the gradients of ``function(*inputs)``, by operations that have gradients themselves.

    The function is given aliases: where one input was computed from another, each has the gradient of its own place.

    Args:
        function: the formula; returns a tensor or several.
        inputs: what it is given.
        needed: which of them want a gradient.
        gradients: of each output; None: there is none.
    """
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        found = function(*aliases)
    pairs = zip((found,) if isinstance(found, Tensor) else found, gradients, strict=True)
    outputs, given = zip(*[(y, d) for y, d in pairs if d is not None], strict=True)
    wanted = [tensor for tensor, need in zip(aliases, needed, strict=True) if tensor is not None and need]
    made = iter(torch.autograd.grad(outputs, wanted, given, create_graph=graph, materialize_grads=True))
    return [next(made) if tensor is not None and need else None for tensor, need in zip(aliases, needed, strict=True)]
