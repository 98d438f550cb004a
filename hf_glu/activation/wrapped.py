"""Names with a prefix that changes what the elementwise part is given: N(shift(g)) [* u] for any N.

A wrapper starts without effect. Wrappers nest by their order in the registry: the outermost shifts first.

Shapes: W channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hf_glu.activation.context import Reader
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.activation.kernels.formulas import split_gate_up
from hf_glu.activation.module import GatedActivation, OwnedActivation, OwnedModule, reset_elementwise
from hf_glu.config.registry import GATED, Activation, Derived, registry

if TYPE_CHECKING:
    from hf_glu.config.glu import GluConfig


class Shift(Reader, OwnedModule):
    """What a wrapper does to the gate: ``[..., W]`` in and out; the gate itself until it is `configure`d."""

    def configure(self, options: GluConfig, width: int) -> None:
        """Make the parameters of ``width`` channels."""
        raise NotImplementedError

    def neutral(self) -> bool:
        """Tell whether it does nothing."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A family of wrapped names.

    Attributes:
        prefix: before the name.
        order: among wrappers; those with a lower one are further outside.
        flag: of its entries.
        equation: what the elementwise part is given.
        paper: where it comes from.
        shift: makes a fresh shift.
    """

    prefix: str
    order: int
    flag: str
    equation: str
    paper: str
    shift: Callable[[], Shift]

    def register(self, equation: str) -> None:
        """Add the family, which computes ``equation``, to the registry."""
        pattern = f"{self.prefix}N"
        registry.add_family(
            Derived(
                pattern=pattern,
                place="wrapper",
                order=self.order,
                equation=equation,
                paper=self.paper,
                derive=self.derive,
            )
        )

    def derive(self, name: str, inner: str, entry: Activation | None) -> Activation:
        """Return the activation ``name``, which is this wrapper around ``inner``."""
        flags = frozenset({self.flag}) | (entry.flags if entry else frozenset())
        if entry is None or GATED not in flags:
            return Activation(
                name=name, equation=f"{inner}({self.equation})", paper=self.paper, flags=flags,
                factory=partial(WrappedGate, name, inner, self),
            )  # fmt: skip
        factory = partial(WrappedFormula, name, inner, self) if entry.formula else partial(GatedActivation, name)
        return Activation(
            name=name, equation=f"{entry.equation}, with {self.equation} for g", paper=self.paper, flags=flags,
            gate=None if entry.gate is None else self.prefix + entry.gate, formula=entry.formula, factory=factory,
        )  # fmt: skip


class WrappedGate(OwnedActivation):
    """N(shift(g)). Shapes: input and output ``[..., W]``."""

    gated = False

    def __init__(self, name: str, inner: str, wrapper: Wrapper) -> None:
        super().__init__()
        self.name, self.base = name, inner
        self.shift = wrapper.shift()
        self.phi = build_elementwise(self.base)

    def configure(self, options: GluConfig, width: int) -> None:
        """Hand the options on."""
        self.shift.configure(options, width)
        if isinstance(self.phi, OwnedActivation):
            self.phi.configure(options, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to the shifted gate."""
        out: Tensor = self.phi(self.shift(x))
        return out

    def shifted(self, x: Tensor) -> Tensor:
        """Return the gate after all shifts."""
        x = self.shift(x)
        return self.phi.shifted(x) if isinstance(self.phi, WrappedGate) else x

    def reset_parameters(self) -> None:
        """Give a parametric N its own values."""
        if not isinstance(self.phi, OwnedModule):
            reset_elementwise(self.phi, self.base)

    def extra_repr(self) -> str:
        """Show the name in the model's printout."""
        return f"{self.name!r}"


class WrappedFormula(GatedActivation):
    """An entry's own formula of (shift(g), u)."""

    def __init__(self, name: str, inner: str, wrapper: Wrapper) -> None:
        super().__init__(name)
        wrapped = registry[inner].factory()
        self.shift = wrapper.shift()
        self.inner = wrapped.shift if isinstance(wrapped, WrappedFormula) else None

    def configure(self, options: GluConfig, width: int) -> None:
        """Hand the options on."""
        self.shift.configure(options, width)
        if self.inner is not None:
            self.inner.configure(options, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the formula."""
        assert self.formula is not None
        gate, up = split_gate_up(x)
        gate = self.shift(gate)
        return self.formula(gate if self.inner is None else self.inner(gate), up)


def shifts(act: nn.Module) -> list[Shift]:
    """Return every shift in an activation."""
    return [module for module in act.modules() if isinstance(module, Shift)]
