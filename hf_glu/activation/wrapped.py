"""Names with a prefix that changes what the elementwise part is given: N(shift(g)) [* u] for any N.

A wrapper starts without effect. Wrappers nest by their order in the registry: the outermost shifts first.

Shapes: W channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from hf_glu.activation.context import Reader
from hf_glu.activation.context.confidence import Confidence
from hf_glu.activation.context.passes import current_pass
from hf_glu.activation.context.states import Trail, trail_of
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.activation.kernels.compiled import has_kernels
from hf_glu.activation.kernels.formulas import split_gate_up
from hf_glu.activation.kernels.known import is_bare
from hf_glu.activation.module import GatedActivation, OwnedActivation, OwnedModule, reset_elementwise
from hf_glu.config.registry import registry

if TYPE_CHECKING:
    from hf_glu.config.glu import GluConfig


class Shift(OwnedModule):
    """What a wrapper does to the gate: ``[..., W]`` in and out; the gate itself until it is `configure`d.

    Attributes:
        hears: whether it is given what a router says, too (`hf_glu.activation.kappa.Confidence`).
    """

    hears: bool = False

    def configure(self, options: GluConfig, width: int) -> None:
        """Make the parameters of ``width`` channels."""
        raise NotImplementedError

    def neutral(self) -> bool:
        """Return whether it does nothing."""
        raise NotImplementedError

    def then(self, phi: nn.Module, gate: Tensor) -> Tensor | None:
        """Return phi of the shifted gate in one pass; None where there is no kernel for that."""
        return None


class TextShift(Reader, Shift):
    """A shift that reads the text around a token."""

    def trail(self) -> Trail | None:
        """Return the states that one more token goes on from; None where there is more to do, or more to learn."""
        now = current_pass()
        if now is None or now.reading is None or now.reading.length != 1 or now.reading.rows is not None:
            return None
        if now.reading.valid is not None:
            return None
        if torch.is_grad_enabled() or not isinstance(now.cache, DynamicCache) or torch.compiler.is_compiling():
            return None
        return trail_of(now.cache, self.slot)


class WrappedGate(OwnedActivation):
    """N(shift(g)). Shapes: input and output ``[..., W]``."""

    gated = False

    def __init__(self, name: str, inner: str, shift: Callable[[], Shift]) -> None:
        super().__init__()
        self.name, self.base = name, inner
        self.shift = shift()
        self.phi = build_elementwise(self.base)

    def configure(self, options: GluConfig, width: int) -> None:
        """Hand the options on."""
        self.shift.configure(options, width)
        if isinstance(self.phi, OwnedActivation):
            self.phi.configure(options, width)

    def forward(self, x: Tensor, confidence: Confidence | None = None) -> Tensor:
        """Apply the activation to the shifted gate; ``confidence`` is what the router says, in an expert."""
        if self.is_fused and is_bare(self.shift) and (made := self.shift.then(self.phi, x)) is not None:
            return made
        x = self.shift(x, confidence) if self.shift.hears else self.shift(x)
        if confidence is not None and isinstance(self.phi, WrappedGate):
            return self.phi(x, confidence)
        out: Tensor = self.phi(x)
        return out

    def shifted(self, x: Tensor) -> Tensor:
        """Return the gate after all shifts, outside of experts."""
        x = self.shift(x)
        return self.phi.shifted(x) if isinstance(self.phi, WrappedGate) else x

    def is_fusible(self, device: str) -> bool:
        """Return whether there is a kernel for the shift and N."""
        return type(self.shift).then is not Shift.then and has_kernels((self.phi,), device)

    def reset_parameters(self) -> None:
        """Give a parametric N its own values."""
        if not isinstance(self.phi, OwnedModule):
            reset_elementwise(self.phi, self.base)

    def extra_repr(self) -> str:
        """Show the name in the model's printout."""
        return f"{self.name!r}"


class WrappedFormula(GatedActivation):
    """An entry's own formula of (shifts(g), u).

    The shifts are modules of their own, from the outside in ``shift``, ``inner``, ``inner_2``, ``inner_3``, ...: what
    the state dict calls them.
    """

    def __init__(self, name: str, inner: str, shift: Callable[[], Shift]) -> None:
        super().__init__(name)
        wrapped = registry[inner].factory()
        own = [shift(), *(wrapped.shifts() if isinstance(wrapped, WrappedFormula) else ())]
        for place, module in enumerate(own):
            setattr(self, _name_of_shift(place), module)

    def shifts(self) -> list[Shift]:
        """Return the shifts, the outermost first."""
        return [module for module in self.children() if isinstance(module, Shift)]

    def configure(self, options: GluConfig, width: int) -> None:
        """Hand the options on."""
        for shift in self.shifts():
            shift.configure(options, width)

    def forward(self, x: Tensor, confidence: Confidence | None = None) -> Tensor:
        """Apply the formula; ``confidence`` is what the router says, in an expert."""
        assert self.formula is not None
        gate, up = split_gate_up(x)
        for shift in self.shifts():
            gate = shift(gate, confidence) if shift.hears else shift(gate)
        return self.formula(gate, up)


def _name_of_shift(place: int) -> str:
    return ("shift", "inner")[place] if place < 2 else f"inner_{place}"


def shifts(act: nn.Module) -> list[Shift]:
    """Return every shift in an activation."""
    return [module for module in act.modules() if isinstance(module, Shift)]
