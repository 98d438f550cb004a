"""Blocks of rows that stay in the cores' caches: a formula of many elementwise operations is bound by memory otherwise.

Shapes: N rows, W channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Elements. On a CPU for each thread: a few float32 buffers of this size fit into a core's cache of a megabyte or two,
# and with smaller ones the threads mostly wait for each other. Elsewhere it bounds the memory.
SIZE, LARGE = 2**16, 2**22


def rows_of(x: Tensor, size: int | None = None) -> int:
    """Return how many rows of ``x`` ``[N, W]`` make a block, of ``size`` elements a thread on a CPU (None: `SIZE`)."""
    size = (size or SIZE) * torch.get_num_threads() if x.device.type == "cpu" else LARGE
    return min(len(x), max(1, size // x.shape[1]))


def split(rows: int, *tensors: Tensor | None) -> list[tuple[Any, ...]]:
    """Return the blocks that tensors ``[N, ...]`` are cut into; None stays None."""
    count = next(len(tensor) for tensor in tensors if tensor is not None)
    parts = [[None] * -(-count // rows) if tensor is None else tensor.split(rows) for tensor in tensors]
    return list(zip(*parts, strict=True))


def exact(tensor: Tensor, buffer: Tensor) -> Tensor:
    """Return a block in its buffer's precision, copied only where that differs: a copy has other bits (GELU)."""
    return tensor if tensor.dtype == buffer.dtype else buffer.copy_(tensor)


def put(out: Tensor, operation: Callable[..., Tensor], buffer: Tensor) -> None:
    """Fill ``out`` with what an operation gives, by way of ``buffer`` where the precisions differ."""
    if out.dtype == buffer.dtype:
        operation(out=out)
    else:
        out.copy_(operation(out=buffer))
