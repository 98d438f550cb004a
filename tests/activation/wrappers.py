"""The table of wrappers: what the suite in test_wrappers.py needs of each kind; a kind without a row fails there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind.

    Attributes:
        parameters: what each shift has.
        options: such options as aren't the default; of its section.
        refused: options that can't be used.
        walk: the gate's value at each token of one text ``[T, W]``, in words of the equation and token by token; None:
            it reads no other tokens of the text.
    """

    parameters: tuple[str, ...]
    options: dict[str, Any]
    refused: tuple[dict[str, Any], ...]
    walk: Callable[[list[Tensor], Parameters], list[Tensor]] | None = None
    both: dict[str, Any] | None = field(default_factory=lambda: {"direction": "both"})


def remember(gates: list[Tensor], p: Parameters) -> list[Tensor]:
    state, found, decay = torch.zeros_like(gates[0]), [], p["decay"].sigmoid()
    for g in gates:
        n = g.sigmoid()
        found.append(g + p["alpha"] * state + p["beta"] * (n - state))
        state = decay * state + (1 - decay) * n
    return found


def convolve(gates: list[Tensor], p: Parameters) -> list[Tensor]:
    taps = p["taps"]
    return [g + sum(taps[i] * gates[t - i] for i in range(min(len(taps), t + 1))) for t, g in enumerate(gates)]


def smear(gates: list[Tensor], p: Parameters) -> list[Tensor]:
    earlier = [torch.zeros_like(gates[0]), *gates]
    return [g + p["share"] * (p["slope"] * g + p["offset"]).sigmoid() * earlier[t] for t, g in enumerate(gates)]


TABLE = {
    "modulated": Row(parameters=("threshold", "slope"), options={"size": 3}, refused=({"size": 0},), both=None),
    "stateful": Row(
        parameters=("alpha", "beta", "decay"), options={"decay": [0.2, 0.9]}, refused=({"decay": 2},), walk=remember
    ),
    "canon": Row(
        parameters=("taps",), options={"kernel": 3}, refused=({"kernel": 1}, {"kernel": True}, {"direction": "up"}),
        walk=convolve,
    ),
    "smear": Row(
        parameters=("share", "slope", "offset"), options={"open": 0.9}, refused=({"open": 1}, {"open": "0.5"}),
        walk=smear,
    ),
}  # fmt: skip
