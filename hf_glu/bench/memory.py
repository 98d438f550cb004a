"""Measuring memory: the bytes that autograd keeps between the passes, and the peak of a call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class _Kept:
    """A tensor that autograd keeps, in a wrapper that dies with the node that keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor] = ()) -> int:
    """Measure the bytes that autograd keeps between ``forward`` and its backward pass.

    A storage that is kept twice, or by two views, counts once; those of ``parameters`` don't count.
    """
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        held = _Kept(tensor)
        kept.add(held)
        return held

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        out = forward()
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages = {s.data_ptr(): s.nbytes() for s in (held.tensor.untyped_storage() for held in kept)}
    del out
    return sum(size for address, size in storages.items() if address not in own)


def peak_bytes(call: Callable[[], object]) -> int:
    """Measure the peak memory of ``call``, beyond what was allocated before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    found: Any = profiler.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return int(most)
