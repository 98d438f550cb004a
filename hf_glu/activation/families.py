"""Families of names: what a prefix makes of the activation whose name follows it.

Neither torch nor Transformers is imported here: what computes is named, and found when it is called.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from typing import Any

from hf_glu.config.kinds import Activation, Derived, Kind
from hf_glu.config.registry import GATED, NORMED


class Later:
    """Something of a module, which is imported when it is called.

    Args:
        where: ``package.module:name``.
    """

    def __init__(self, where: str) -> None:
        self.__module__, _, self.__name__ = where.partition(":")

    def __call__(self, *args: Any) -> Any:
        return getattr(import_module(self.__module__), self.__name__)(*args)


gated = Later("hf_glu.activation.module:GatedActivation")
_wrapped_gate = Later("hf_glu.activation.wrapped:WrappedGate")
_wrapped_formula = Later("hf_glu.activation.wrapped:WrappedFormula")


@dataclass(frozen=True, kw_only=True)
class Mixes:
    """A family of mixes: sums of functions with trained coefficients.

    Attributes:
        prefix: before the name of the activation that a mix is annealed to.
        coefficient: what the trained coefficients are called in equations.
        note: says what they are.
        paper: where it comes from.
        flags: of its entries.
        kind: what others must know of it.
        options: its own in ``config.hf_glu["mix"]``, with their defaults.
        make: makes the mix of an elementwise name.
    """

    prefix: str
    coefficient: str
    note: str
    paper: str
    flags: frozenset[str]
    kind: Kind
    options: dict[str, Any]
    make: Later

    @property
    def home(self) -> str:
        """The module that computes it."""
        return self.make.__module__

    def equation(self, x: str, suffix: str = "") -> str:
        """Return what an entry computes."""
        return f"sum_k {self.coefficient} phi_k({x}){suffix}, {self.note}"

    def derived(self) -> Derived:
        """Return the family as the registry has it."""
        return Derived(
            pattern=f"{self.prefix}N", place="mix", equation=self.equation("g", " [* u]"), paper=self.paper,
            derive=self.derive, kind=self.kind, options={"mix": self.options},
        )  # fmt: skip

    def derive(self, name: str, inner: str, entry: Activation | None) -> Activation | None:
        """Return the activation ``name``, a mix that ends as ``inner``; None where there is no such N(g) * u."""
        if entry is not None and NORMED in entry.flags:
            return None
        if entry is None or GATED not in entry.flags:
            equation, factory = self.equation("x"), partial(self.make, name)
            return Activation(name=name, equation=equation, paper=self.paper, flags=self.flags, factory=factory)
        if entry.gate is None:
            return None
        return Activation(
            name=name, equation=self.equation("g", " * u"), paper=self.paper, flags=self.flags | {GATED},
            factory=partial(gated, name), gate=self.prefix + entry.gate,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A family of wrapped names: N(shift(g)) [* u] for any N.

    Attributes:
        kind: what others must know of it; its flag and ``_`` stand before the name.
        order: among wrappers; those with a lower one are further outside.
        equation: what the elementwise part is given, ``z = ...`` where that is long.
        paper: where it comes from.
        shift: makes a fresh shift.
    """

    kind: Kind
    order: int
    equation: str
    paper: str
    shift: Later

    @property
    def home(self) -> str:
        """The module that computes it."""
        return self.shift.__module__

    @property
    def prefix(self) -> str:
        """What stands before the name."""
        return f"{self.kind.flag}_"

    def derived(self) -> Derived:
        """Return the family as the registry has it."""
        named, section = self.equation.startswith("z = "), self.kind.section
        defaults = {each.name: _plain(each.default) for each in fields(section)} if section else {}  # type: ignore[arg-type]
        return Derived(
            pattern=f"{self.prefix}N", place="wrapper", order=self.order, paper=self.paper, derive=self.derive,
            equation=f"N(z) [* u], {self.equation}" if named else f"N({self.equation}) [* u]", kind=self.kind,
            options={section.key: defaults} if section else {},
        )  # fmt: skip

    def derive(self, name: str, inner: str, entry: Activation | None) -> Activation:
        """Return the activation ``name``, which is this wrapper around ``inner``."""
        flags = frozenset({self.kind.flag}) | (entry.flags if entry else frozenset())
        if entry is None or GATED not in flags:
            return Activation(
                name=name, equation=f"{inner}({self.equation})", paper=self.paper, flags=flags,
                factory=partial(_wrapped_gate, name, inner, self.shift),
            )  # fmt: skip
        factory = partial(_wrapped_formula, name, inner, self.shift) if entry.formula else partial(gated, name)
        return Activation(
            name=name, equation=f"{entry.equation}, with {self.equation} for g", paper=self.paper, flags=flags,
            gate=None if entry.gate is None else self.prefix + entry.gate, formula=entry.formula, factory=factory,
        )  # fmt: skip


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
