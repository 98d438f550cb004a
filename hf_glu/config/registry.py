"""The one open registry of activations, and the one grammar of their names.

    name := wrapper* mix? base        stateful_moa_swiglu
    base := entry | N | N_glu         N: an elementwise activation of Transformers, or an entry without a gate

Each wrapper stands at most once; in whatever order they stand, one reading comes out, in which they nest by their
``order``. A new base is an `Activation`, a new wrapper, mix or suffix a `Derived`, whose `Kind` says what others must
know of it: that is all that one needs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

from hf_glu.compat.of_models import activation_names
from hf_glu.config.kinds import Activation as Activation
from hf_glu.config.kinds import Derived as Derived
from hf_glu.config.kinds import Formula as Formula
from hf_glu.config.kinds import Kind
from hf_glu.errors import DuplicateNameError, UnknownNameError, nearest, shown

GATED, LEARNABLE, ADAPTIVE, MODULATED, KAPPA = "gated", "learnable", "adaptive", "modulated", "kappa"
NORMED = "normed"  # a channel's value depends on all channels of its token
LONGEST = 128  # characters of a name
_local = threading.local()  # undo: what takes a thread's changes back


@dataclass(frozen=True, kw_only=True)
class NameReading:
    """A name as its parts.

    Attributes:
        wrappers: prefixes, the outermost first.
        mix: a prefix, or nothing.
        base: the rest.
    """

    wrappers: tuple[str, ...] = ()
    mix: str = ""
    base: str

    @property
    def inner(self) -> str:
        """The name without wrappers."""
        return self.mix + self.base

    @property
    def name(self) -> str:
        """The name in its canonical order."""
        return "".join(self.wrappers) + self.inner


class Registry:
    """Activations by name, and families of names that are derived on request."""

    def __init__(self) -> None:
        self._entries: dict[str, Activation] = {}
        self._families: dict[str, Derived] = {}

    def add(self, activation: Activation) -> Activation:
        """Add an entry; adding the same one again is a no-op, another one under its name raises."""
        if activation.name not in self._entries:
            _note(partial(self._entries.pop, activation.name, None))
        known = self._entries.setdefault(activation.name, activation)
        if known != activation:
            raise DuplicateNameError(f"the activation {activation.name!r} is already registered as {known.equation}")
        return known

    def add_family(self, derived: Derived) -> None:
        """Add a family of names; adding the same one again is a no-op."""
        if derived.pattern not in self._families:
            _note(partial(self._families.pop, derived.pattern, None))
        if self._families.setdefault(derived.pattern, derived) != derived:
            raise DuplicateNameError(f"the names {derived.pattern!r} are already registered")

    @property
    def families(self) -> tuple[Derived, ...]:
        """The families of names: suffixes and mixes first, then wrappers from the outside in."""
        return tuple(sorted(self._families.values(), key=Derived.rank))

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of mixes and wrappers."""
        return tuple(family.kind for family in self.families if family.kind)

    @property
    def sections(self) -> dict[str, Kind]:
        """The kinds that have options of their own, by the key of their section in ``config.hf_glu``."""
        return {kind.section.key: kind for kind in self.kinds if kind.section}

    def remove(self, name: str) -> None:
        """Remove an entry."""
        if (removed := self._entries.pop(name, None)) is not None:
            _note(partial(self._entries.setdefault, name, removed))
        else:
            raise UnknownNameError(f"no activation {shown(name)} to remove; {nearest(name, self._entries)}")

    def stock(self) -> Collection[str]:
        """Return the names of Transformers' own activations, which isn't imported for them."""
        return activation_names()

    def is_stock(self, name: str) -> bool:
        """Return whether Transformers itself has an activation of this name."""
        return name not in self._entries and name in self.stock()

    def read(self, name: object) -> NameReading | None:
        """Return the parts of a name, None where it follows the grammar to no base that there is."""
        prefixes, base, problem = self._split(name)
        if problem:
            return None
        mix = prefixes.pop().affix if prefixes and prefixes[-1].place == "mix" else ""
        wrappers = sorted(prefixes, key=Derived.rank)
        return NameReading(wrappers=tuple(wrapper.affix for wrapper in wrappers), mix=mix, base=base)

    def _split(self, name: object) -> tuple[list[Derived], str, str]:
        """Return the prefixes of a name, what follows them, and what is wrong with it (nothing: it is a base)."""
        if not isinstance(name, str) or len(name) > LONGEST:
            return [], "", f"a name is text of at most {LONGEST} characters"
        known = [family for family in self.families if family.place != "suffix"]
        found: list[Derived] = []
        while not self._is_base(name):
            prefix = max((f for f in known if name.startswith(f.affix)), key=lambda f: len(f.affix), default=None)
            if prefix is None:
                return found, name, "unknown"
            if prefix in found:
                return found, name, f"{prefix.affix} stands there twice"
            if found and found[-1].place == "mix":
                return found, name, f"after {found[-1].affix} comes no {prefix.affix}"
            found.append(prefix)
            name = name.removeprefix(prefix.affix)
        return found, name, ""

    def _is_base(self, name: str) -> bool:
        return name in self._entries or self.is_stock(name) or self._suffixed(name) is not None

    def _suffixed(self, name: str) -> Activation | None:
        """Return the activation of an elementwise base with a suffix."""
        for family in self.families:
            plain = name.removesuffix(family.affix)
            if family.place != "suffix" or plain == name or not name.isidentifier():
                continue
            entry = self._entries.get(plain)
            if (entry is not None and GATED not in entry.flags) or self.is_stock(plain):
                return family.derive(name, plain, entry)
        return None

    def find(self, name: object) -> Activation | None:
        """Return the activation called ``name``, under its canonical name; None: there is none, or not of ours."""
        reading = self.read(name)
        if reading is None:
            return None
        name = reading.base
        found = self._entries.get(name) or self._suffixed(name)
        for prefix in (reading.mix, *reversed(reading.wrappers)):
            if prefix:
                inner, name = name, prefix + name
                if (found := self._families[f"{prefix}N"].derive(name, inner, found)) is None:
                    return None
        return found

    def unknown(self, name: object, kind: Literal["", "gated ", "elementwise "] = "") -> UnknownNameError:
        """Return the error that says what is wrong with a name of a ``kind``."""
        prefixes, base, problem = self._split(name)
        start = "".join(family.affix for family in prefixes)
        if not problem:
            problem = f"{base} can't have {prefixes[-1].affix}" if prefixes else f"{base} is Transformers' own"
        elif problem == "unknown":
            entries = [] if kind == "elementwise " else [*self._entries]
            stock = [] if kind == "gated " else [plain for plain in self.stock() if self.is_stock(plain)]
            plain, patterns = [start + known for known in (*entries, *stock)], self._families if entries else ()
            among = (plain, self._derived(plain, entries))
            problem = nearest(name, [*plain, *(start + pattern for pattern in patterns)], among=among)
        return UnknownNameError(f"unknown {kind}activation {shown(name)}; {problem}")

    def _derived(self, names: list[str], entries: list[str]) -> Iterator[str]:
        """Yield names with each prefix and, where entries count, all that have a suffix: what may have been meant."""
        suffixes = [family.affix for family in self.families if family.place == "suffix" and entries]
        suffixed = [name + suffix for suffix in suffixes for name in self.stock()]
        yield from suffixed
        for family in self.families:
            yield from (family.affix + name for name in (*names, *suffixed) if family.place != "suffix")

    def __getitem__(self, name: str) -> Activation:
        if found := self.find(name):
            return found
        raise self.unknown(name, "gated ")

    def __iter__(self) -> Iterator[Activation]:
        return iter(tuple(self._entries.values()))

    @contextmanager
    def scoped(self) -> Iterator[None]:
        """Take back, after the block, what this thread has added and removed in it."""
        outer, undo = getattr(_local, "undo", None), list[Callable[[], object]]()
        _local.undo = undo
        try:
            yield
        finally:
            _local.undo = outer
            for action in reversed(undo):
                action()


def _note(action: Callable[[], object]) -> None:
    """Keep ``action`` to undo a change, where this thread is in a block that takes its changes back."""
    if (undo := getattr(_local, "undo", None)) is not None:
        undo.append(action)


registry = Registry()


def unwrapped(name: str) -> str:
    """Return the activation inside of ``name``: ``swiglu`` of ``stateful_swiglu``."""
    reading = registry.read(name)
    return name if reading is None else reading.inner


def hears(name: object) -> bool:
    """Return whether an activation is to be told how much a router gives its expert."""
    entry = registry.find(name)
    return entry is not None and KAPPA in entry.flags


def reads_text(name: str) -> bool:
    """Return whether an activation has wrappers that must see the text around a token."""
    reading = registry.read(name)
    return reading is not None and any(wrapper != f"{KAPPA}_" for wrapper in reading.wrappers)


def unmixed(name: str) -> str:
    """Return the activation that a mix is annealed to: ``stateful_swiglu`` of ``stateful_moa_swiglu``."""
    reading = registry.read(name)
    return name if reading is None else "".join(reading.wrappers) + reading.base


def adds_wrappers(source: str, target: str) -> bool:
    """Return whether ``target`` is ``source`` with more wrappers around it."""
    before, after = registry.read(source), registry.read(target)
    if before is None or after is None:
        return False
    return before.inner == after.inner and set(before.wrappers) < set(after.wrappers)


def core(name: str) -> str:
    """Return the elementwise activation at the heart of ``name``: ``silu`` of ``stateful_swiglu``."""
    entry = registry.find(name)
    return unwrapped((entry.gate if entry else None) or name)
