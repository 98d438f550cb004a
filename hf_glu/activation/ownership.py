"""Whether a tensor that a custom function has kept for its backward pass may be written over there.

It may if the graph is used once and nothing else refers to the tensor or to its memory: no hook's list, no other node
of the graph, no view. References are counted, and compared with what they are where nothing else does.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

Count = tuple[int, ...]
# none of these is torch's public interface; without one of them nothing is written over
KNOWN = (
    hasattr(torch.Tensor, "_use_count")
    and hasattr(torch._C, "_storage_Use_Count")
    and hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
)


def is_sole_owner(x: Tensor) -> bool:
    """Tell so of a tensor that the running backward pass of a custom function has unpacked into one variable."""
    if not KNOWN or not x.is_contiguous() or torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    return count(x) == alone(x._base is not None)


def count(x: Tensor) -> Count:
    """Return the references to the Python object, to the tensor and to its memory; of what it is a view of, too."""
    of_tensor: Any = torch.Tensor._use_count  # type: ignore[attr-defined]
    base = x._base
    whole = () if base is None else (sys.getrefcount(base), of_tensor(base))
    return sys.getrefcount(x), of_tensor(x), torch._C._storage_Use_Count(x.untyped_storage()._cdata), *whole


@cache
def alone(view: bool) -> Count:
    """Return the counts of a tensor that only a custom function has kept, one of its own or a view."""
    found: list[Count] = []

    def through(x: Tensor) -> Count:  # as `is_sole_owner` does, whose variable counts, too
        return count(x)

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.zeros(1)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            found.append(through(x))
            return torch.zeros(1)

    def kept() -> Tensor:
        x = torch.zeros(1, requires_grad=True) * 1
        y: Tensor = Probe.apply(x.view(1) if view else x)
        return y

    with torch.enable_grad():
        y = kept()
    y.backward()
    return found[0]
