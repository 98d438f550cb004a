"""The gate of a Mamba mixer: a state-space model has no attention, and its gate is what selects.

The mixer multiplies its scan's output by silu(g), g being a part of its in-projection's output; the silu is inside of
the scan, or of a norm. Its class is subclassed in place: while its own forward runs, its in-projection is followed by
what a wrapped silu does to g; for any other activation, g is replaced by a constant, and the scan's output multiplied
by the activation instead. The convolution's activation, the scan and its kernels stay as they are (up to Transformers
5.14 the forward asks for the convolution's by the gate's name, and both are silu).
What one call hands from one part to another is kept by thread: two may run one model at once.

Not hooks on the projections: LoRA, quantised layers and whatever else takes the place of one keeps the hooks on the
inner layer, where they would see a part of its output, or loses them, and the gate would be another without a word.
What stands at ``in_proj`` when the forward asks for it is the whole projection, whoever has wrapped it. It costs what
hooks would: 0.84 of their time for one token, 1.00 for 64 (Mamba, hidden 256, one thread), with the same bits.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_glu.activation.module import innermost
from hf_glu.activation.wrapped import WrappedGate
from hf_glu.compat.of_models import GATE_ALONE
from hf_glu.compat.of_torch import CHILDREN
from hf_glu.errors import TrainingError
from hf_glu.inplace import InPlace, become

GATE = "silu"  # what the gate is in the families' own code; the config's field names the convolution's activation
ONE = 1.2784645427610738  # silu of it is 1
_local = threading.local()  # mixer: the one that runs; gate: its g, between the in-projection and what it gates


class _Around:
    """A part of a mixer, called as the mixer's own forward does it."""

    def __init__(self, mixer: Any, name: str) -> None:
        self.mixer, self.plain = mixer, CHILDREN.of(mixer)[name]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)


class _Projected(_Around):
    """The in-projection, its gate shifted or taken out."""

    def __call__(self, x: Tensor) -> Tensor:
        mixer, out = self.mixer, self.plain(x)
        width, begin = mixer.intermediate_size, mixer.gate_begin
        before, gate, after = out.split([begin, width, out.shape[-1] - begin - width], dim=-1)
        if mixer.owns:
            _local.gate, gate = gate, torch.full_like(gate, ONE)
        else:
            gate = CHILDREN.of(mixer)["act"].shifted(gate)
        return torch.cat([before, gate, after], dim=-1)


class _Gated(_Around):
    """What takes the scan's output, which silu(g) = 1 left alone: the out-projection, or Mamba-2's gated norm."""

    def __call__(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        mixer = self.mixer
        opened, _local.gate = CHILDREN.of(mixer)["act"](_local.gate), None
        if gate is not None:
            return self.plain(x * opened.to(x.dtype), None)
        one = functional.silu(torch.tensor(ONE, dtype=opened.dtype, device=opened.device))
        return self.plain(x * (opened / one).to(x.dtype))


class GatedMixer(InPlace, nn.Module):
    """What a mixer becomes; see `own_gate`.

    Attributes:
        gate_begin: where in the in-projection's output the gate begins.
        owns: whether the activation isn't a silu, so that the scan's own must do nothing.
    """

    owns: bool
    gate_begin: int

    @property
    def running(self) -> bool:
        """Whether this thread runs the forward."""
        return getattr(_local, "mixer", None) is self

    @property
    def act(self) -> Any:
        """The gate's activation; to a forward of before Transformers 5.15, the convolution's."""
        return functional.silu if self.running else CHILDREN.of(self)["act"]

    @property
    def in_proj(self) -> Any:
        """The in-projection."""
        return _Projected(self, "in_proj") if self.running else CHILDREN.of(self)["in_proj"]

    @property
    def out_proj(self) -> Any:
        """The out-projection."""
        gates = self.running and self.owns and "norm" not in CHILDREN.of(self)
        return _Gated(self, "out_proj") if gates else CHILDREN.of(self)["out_proj"]

    @property
    def norm(self) -> Any:
        """Mamba-2's gated norm."""
        return _Gated(self, "norm") if self.running and self.owns else CHILDREN.of(self)["norm"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the family's forward.

        Raises:
            TrainingError: a fused kernel took the whole mixer over, which knows no gate but silu.
        """
        _local.mixer, _local.gate = self, None
        try:
            out = super().forward(*args, **kwargs)
            if _local.gate is not None:
                raise TrainingError("a fused kernel of Mamba's has no gate but silu: uninstall it, or stay with silu")
            return out
        finally:
            _local.mixer, _local.gate = None, None


def gate_of(mixer: Any) -> str | None:
    """Return the activation of a mixer's gate where that is the family's own, None where we have given it another."""
    return None if isinstance(mixer, GatedMixer) else GATE


def own_gate(mixer: Any, convolution: str) -> None:
    """Give a mixer the gate that its ``act`` is, in place.

    Raises:
        IncompatibleTransformersError: before 5.15, the activation of its ``convolution`` isn't silu, and would be lost.
    """
    if convolution not in (GATE, "swish"):
        GATE_ALONE.find()
    inner = innermost(mixer.act)[1]
    silu = isinstance(inner, (nn.SiLU, type(functional.silu))) or type(inner).__name__ == "SiLUActivation"
    if silu and not isinstance(mixer.act, WrappedGate):
        return
    mixer.gate_begin, mixer.owns = gate_begin(mixer), not silu
    become(mixer, GatedMixer)


def gate_begin(mixer: Any) -> int:
    """Return where in its in-projection's output a mixer's gate begins: Mamba's after the scan's input."""
    return int(mixer.intermediate_size) if hasattr(mixer, "x_proj") else 0
