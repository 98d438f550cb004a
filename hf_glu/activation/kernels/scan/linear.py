"""Linear recurrences along the first dimension, in place: the two ways to run them.

Inputs x ``[steps, ...]`` become the states of a walk, from the one ``carried`` into it and with rates ``[steps, ...]``:

    s_i = x_i + r_i * s_(i-1),   in reverse s_i = x_i + r_i * s_(i+1)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_glu.compat.of_torch import MULTIPLY_ADD


def ends(reverse: bool) -> tuple[int, int]:
    """Return the indices of a walk's first and last step."""
    return (-1, 0) if reverse else (0, -1)


def sides(window: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return two views ``[steps, ...]`` of a carried state and all that follow: each step's own, and its last."""
    upper, lower = window[1:], window[:-1]
    return (lower, upper) if reverse else (upper, lower)


def walk(x: Tensor, carried: Tensor, rates: Tensor, reverse: bool) -> None:
    """One multiply-add a token, all in one call: on a CPU (only there), torch's foreach goes through lists in order."""
    states, factors = x.unbind(0), rates.unbind(0)
    if reverse:
        states, factors = states[::-1], factors[::-1]
    MULTIPLY_ADD.find()(states, (carried, *states[:-1]), factors)


def fold(x: Tensor, carried: Tensor, rates: Tensor, reverse: bool) -> None:
    """Log depth, linear work, no division: Blelloch 1990, "Prefix Sums and Their Applications"."""
    first, _ = ends(reverse)
    x[first].addcmul_(rates[first], carried)
    x.copy_(_fold(x.flip(0), rates.flip(0)).flip(0) if reverse else _fold(x, rates))


def _fold(x: Tensor, rates: Tensor) -> Tensor:
    """Return the states of a walk that starts from 0: of each second step, pairs at a time, then those between."""
    if len(x) < 2:
        return x
    even = len(x) // 2 * 2
    first, second = slice(0, even, 2), slice(1, even, 2)
    pairs = _fold(torch.addcmul(x[second], rates[second], x[first]), rates[second] * rates[first])
    states = x.clone()
    states[1::2] = pairs
    states[2::2].addcmul_(rates[2::2], pairs[: (len(x) - 1) // 2])
    return states


@dataclass(frozen=True)
class Backend:
    """A way to run the recurrence.

    Attributes:
        scan: turns inputs into states.
        size: how many elements to work on at a time.
        steps: how many tokens that is at least, if there are as many.
    """

    scan: Callable[[Tensor, Tensor, Tensor, bool], None]
    size: int
    steps: int

    def block(self, times: int, rows: int, width: int) -> tuple[int, int]:
        """Return how many tokens and rows of a non-empty ``[times, rows, width]`` to work on at a time."""
        rows = max(1, min(rows, self.size // (width * min(times, self.steps))))
        return max(1, self.size // (width * rows)), rows


# 2^15 elements stay in a core's cache, and are the most that torch leaves to one thread: with more, each of a walk's
# many short operations waits for the slowest thread, 40 times as long when other processes want the cores as well.
# Accelerators want long blocks instead; 2^22 bounds their memory.
BACKENDS = {
    "walk": Backend(scan=walk, size=2**15, steps=4),
    "parallel": Backend(scan=fold, size=2**22, steps=256),
}


def backend_for(device: torch.device) -> str:
    """Return the name of the faster backend on a device."""
    return "walk" if device.type == "cpu" else "parallel"
