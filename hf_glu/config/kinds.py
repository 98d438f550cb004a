"""Activations, families of their names, and what a kind says of itself, so that no other module lists kinds by name.

A wrapper (``stateful_N``), or a mix (``moa_N``), registers one `Kind` with its family of names. Whoever reads options,
plans, builds, checks or describes a model asks the registry for the kinds (`hf_glu.config.registry.Registry.kinds`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from hf_glu.config.section import Entry
from hf_glu.errors import OptionError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where a model has an activation of a kind.

    Attributes:
        name: of the FFN.
        stack: the innermost Transformers model around it.
        side: ``encoder`` or ``decoder`` in a model that has both, else None.
        blocks: the stack's layers; None: it has no list of them.
        hidden: width of what the FFN is given.
        causal: whether the stack must not see later tokens.
        encoded: whether the model has an encoder and a decoder.
    """

    name: str
    stack: nn.Module
    side: str | None
    blocks: list[nn.Module] | None
    hidden: int
    causal: bool
    encoded: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A module that a kind needs in a model beside its activations, such as the source of a context vector.

    Attributes:
        block: the module that gets it.
        name: the attribute under which it gets it.
        make: builds it, under whatever device context is active.
        parameters: how many it has.
    """

    block: nn.Module
    name: str
    make: Callable[[], nn.Module]
    parameters: int

    @property
    def taken(self) -> bool:
        """Whether the part is there already."""
        return self.name in dict(self.block.named_children())


Check: TypeAlias = Callable[[Sequence[Place], Any], None]
Parts: TypeAlias = Callable[[Sequence[Place], Any], list[Part]]
Curves: TypeAlias = "Callable[[Tensor], Mapping[str, Tensor]]"


def allow(places: Sequence[Place], options: Any) -> None:
    """Let every model have the kind."""


def refuse_lookahead(places: Sequence[Place], options: Any) -> None:
    """Raise OptionError where activations with ``direction="both"`` would let a causal stack see later tokens."""
    for place in places if options.direction == "both" else ():
        if place.causal:
            raise OptionError(
                f"{place.name}: a {options.key} in both directions would let {type(place.stack).__name__} see later "
                "tokens: use direction=forward, or layers=encoder where there is one"
            )


def no_parts(places: Sequence[Place], options: Any) -> list[Part]:
    """Return no part: all that the kind needs is in its activations."""
    return []


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a kind says of itself.

    Attributes:
        flag: of its activations; its prefix is ``flag_``.
        trait: the sentence that a model card says of a model that has it.
        section: its options, the section ``section.key`` of ``config.hf_glu``; None: it has none of its own.
        check: raises OptionError where a model can't have it at some places with such options.
        parts: returns what the model needs beside the activations at some places.
        curves: returns what the elementwise part is given at gates ``[G]`` in some cases, by labels of a figure; None:
            it isn't drawn.
    """

    flag: str
    trait: str
    section: type[Entry] | None = None
    check: Check = allow
    parts: Parts = no_parts
    curves: Curves | None = None


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


Derive: TypeAlias = Callable[[str, str, Activation | None], Activation | None]


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A family of names: an affix at a name N.

    Attributes:
        pattern: the affix and N, such as ``N_glu`` or ``stateful_N``.
        place: ``wrapper`` or ``mix`` (prefixes), or ``suffix`` (of an elementwise base).
        order: of a wrapper: those with a lower one are further outside.
        equation, paper: as of an `Activation`.
        derive: (name, N, N's activation or None where that is Transformers' own) -> the activation called ``name``;
            None where N can't have the affix.
        kind: what else there is to know of such activations; None: nothing.
        options: their defaults in ``config.hf_glu``, by section.
    """

    pattern: str
    place: Literal["wrapper", "mix", "suffix"]
    equation: str
    paper: str
    derive: Derive
    order: int = 0
    kind: Kind | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def affix(self) -> str:
        """What stands at N."""
        return self.pattern.removeprefix("N") if self.place == "suffix" else self.pattern.removesuffix("N")

    def rank(self) -> tuple[bool, int, str]:
        """Return what families are sorted by: wrappers last, from the outside in."""
        return self.place == "wrapper", self.order, self.affix

    def to_dict(self) -> dict[str, Any]:
        """Return what a listing shows, as plain data."""
        options = {section: dict(defaults) for section, defaults in self.options.items()}
        return {"pattern": self.pattern, "equation": self.equation, "paper": self.paper, "options": options}
