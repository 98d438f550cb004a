"""The gate of a Mamba mixer: a state-space model has no attention, and its gate is what selects.

The mixer multiplies its scan's output by silu(g), g being a part of its in-projection's output. A stateful gate shifts
that part; the scan, its kernels and the silu stay as they are. The mixer's class is subclassed in place: while its own
forward runs, its in-projection is followed by the shift.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.wrapped import WrappedGate


class _Through:
    """An in-projection, and the shift of its gate."""

    def __init__(self, mixer: Any) -> None:
        self.mixer = mixer
        self.plain = mixer._modules["in_proj"]

    def __call__(self, x: Tensor) -> Tensor:
        out, width, begin = self.plain(x), self.mixer.intermediate_size, self.mixer.gate_begin
        before, gate, after = out.split([begin, width, out.shape[-1] - begin - width], dim=-1)
        return torch.cat([before, self.mixer.act.shifted(gate), after], dim=-1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)


class StatefulMixer(nn.Module):
    """What a mixer becomes; see `remember`."""

    running: bool = False
    gate_begin: int

    @property
    def in_proj(self) -> Any:
        """The in-projection, to the mixer's own forward with the shift behind it."""
        return _Through(self) if self.running else self._modules["in_proj"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the family's forward."""
        self.running = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.running = False

    def __reduce__(self) -> Any:
        """Pickle by the stock class, which can be found by its name."""
        return _rebuild, (type(self).__mro__[2],), self.__dict__


def remember(mixer: Any) -> None:
    """Let a mixer's gate pass its activation's shifts, in place; does nothing the second time."""
    if isinstance(mixer, StatefulMixer) or not isinstance(mixer.act, WrappedGate):
        return
    mixer.gate_begin = gate_begin(mixer)
    mixer.__class__ = _stateful(type(mixer))


def gate_begin(mixer: Any) -> int:
    """Return where in its in-projection's output a mixer's gate begins: Mamba's after the scan's input."""
    return int(mixer.intermediate_size) if hasattr(mixer, "x_proj") else 0


def _stateful(stock: type) -> type:
    return type(stock.__name__, (StatefulMixer, stock), {"__module__": stock.__module__})


def _rebuild(stock: type) -> nn.Module:
    made: nn.Module = object.__new__(_stateful(stock))
    return made
