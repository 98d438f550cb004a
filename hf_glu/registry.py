"""The one open registry of activations: an entry is all that a new activation needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from hf_glu.errors import DuplicateNameError, UnknownNameError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

GATED, LEARNABLE, ADAPTIVE, STATEFUL, MODULATED = "gated", "learnable", "adaptive", "stateful", "modulated"
WRAPPERS = ("modulated_", "stateful_")  # what may stand before any name, and changes nothing at a conversion
MIXES = ("learnable_", "moa_")  # a trained mix that starts as any activation
Formula: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"


@dataclass(frozen=True, kw_only=True)
class Activation:
    """One activation.

    Attributes:
        name: snake_case, without dashes (T5 splits its field on them).
        equation: what it computes; ``g`` and ``u`` are the gate and up halves of its input ``[g | u]``.
        paper: where it comes from.
        flags: what it is, such as ``gated``.
        factory: a callable without arguments that builds a fresh module (never a shared instance).
        gate: the elementwise activation of its gate half, if it is N(g) * u; that is what a natively gated family,
            which multiplies by the up half itself, is given. None where it has no such form.
        formula: (g, u) -> hidden, where the activation isn't N(g) * u.
    """

    name: str
    equation: str
    paper: str
    flags: frozenset[str]
    factory: Callable[[], nn.Module] = field(compare=False)
    gate: str | None = None
    formula: Formula | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name != self.name.lower():
            raise UnknownNameError(f"an activation's name is snake_case without dashes, got {self.name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return what a listing shows, as plain data."""
        return {
            "name": self.name,
            "equation": self.equation,
            "paper": self.paper,
            "gate": self.gate,
            "flags": sorted(self.flags),
        }


def unwrapped(name: str) -> str:
    """Return the activation inside of ``name``: ``swiglu`` of ``stateful_swiglu``."""
    for prefix in WRAPPERS:
        name = name.removeprefix(prefix)
    return name


def unmixed(name: str) -> str:
    """Return the activation that a mix is annealed to: ``swiglu`` of ``moa_swiglu``."""
    for prefix in MIXES:
        name = name.removeprefix(prefix)
    return name


def adds_wrappers(source: str, target: str) -> bool:
    """Tell whether ``target`` is ``source`` with wrappers around it."""
    return target.endswith(source) and unwrapped(target.removesuffix(source)) == "" and target != source


def core(name: str) -> str:
    """Return the elementwise activation at the heart of ``name``: ``silu`` of ``stateful_swiglu``."""
    entry = registry.find(name)
    return unwrapped((entry.gate if entry else None) or name)


Rule = Callable[[str], Activation | None]


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A family of names that a rule derives.

    Attributes:
        pattern: how such names look, such as ``N_glu``.
        equation, paper: as of an `Activation`.
        rule: returns the activation of a name, None where it isn't one of the family.
    """

    pattern: str
    equation: str
    paper: str
    rule: Rule = field(compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return what a listing shows, as plain data."""
        return {"pattern": self.pattern, "equation": self.equation, "paper": self.paper}


class Registry:
    """Activations by name, and rules that derive further ones (``N_glu``) from a name on request."""

    def __init__(self) -> None:
        self._entries: dict[str, Activation] = {}
        self._rules: dict[str, Derived] = {}

    def add(self, activation: Activation) -> Activation:
        """Add an entry; adding the same one again is a no-op, another one under its name raises."""
        known = self._entries.setdefault(activation.name, activation)
        if known != activation:
            raise DuplicateNameError(f"the activation {activation.name!r} is already registered as {known.equation}")
        return known

    def add_rule(self, derived: Derived) -> None:
        """Add a family of names."""
        if self._rules.setdefault(derived.pattern, derived).rule is not derived.rule:
            raise DuplicateNameError(f"the rule {derived.pattern!r} is already registered")

    @property
    def rules(self) -> tuple[Derived, ...]:
        """The families of names."""
        return tuple(self._rules.values())

    def remove(self, name: str) -> None:
        """Remove an entry."""
        if self._entries.pop(name, None) is None:
            raise UnknownNameError(f"no activation {name!r} to remove; {nearest(name, self._entries)}")

    def find(self, name: object) -> Activation | None:
        """Return the entry or derived activation called ``name``, or None."""
        if not isinstance(name, str):
            return None
        if name in self._entries:
            return self._entries[name]
        return next((found for rule in self._rules.values() if (found := rule.rule(name))), None)

    def __getitem__(self, name: str) -> Activation:
        if found := self.find(name):
            return found
        prefix = name.removesuffix(unmixed(unwrapped(name))) if isinstance(name, str) else ""
        known = [prefix + entry for entry in self._entries] + list(self._rules)
        raise UnknownNameError(f"unknown gated activation {name!r}; {nearest(name, known)}")

    def __iter__(self) -> Iterator[Activation]:
        return iter(tuple(self._entries.values()))

    def snapshot(self) -> Callable[[], None]:
        """Return a function that restores the entries and rules of this moment."""
        entries, rules = dict(self._entries), dict(self._rules)

        def restore() -> None:
            self._entries, self._rules = entries, rules

        return restore


registry = Registry()
