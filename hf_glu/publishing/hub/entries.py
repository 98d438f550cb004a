"""The activations that a model's config names, as the source that puts them into a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import chain, combinations
from typing import Any

from hf_glu.activation import registry
from hf_glu.config.glu import GluConfig
from hf_glu.config.kinds import Kind
from hf_glu.ffn.completeness import activations_in
from hf_glu.publishing.hub.source import Place

UNSAID = ("trait", "curves")  # of a kind: for model cards and figures


class Entries:
    """The entries of the registry that a config needs.

    Args:
        config: of a model.
        options: its options, and those of the configs inside of it.
        readings: whether the parts of names are needed, too.

    Attributes:
        needed: the definitions in the package that the source names.
        entries: by name.
        sections: the kinds of these that have options, and whatever others the config has options of, by their keys.
        readings: the parts of names.
    """

    def __init__(self, config: Any, options: list[GluConfig], *, readings: bool) -> None:
        known = sorted(set(closed(names(config, options))))
        self.entries = {name: entry for name in known if (entry := registry.find(name))}
        self.readings = {name: registry.read(name) for name in known} if readings else {}
        flags = {flag for entry in self.entries.values() for flag in entry.flags}
        self.sections = {
            key: kind
            for key, kind in registry.sections.items()
            if kind.flag in flags or any(key in each.sections for each in options)
        }
        self.needed: list[Place] = [("hf_glu.config.registry", "registry")]
        self.source({})

    def source(self, called: Mapping[Place, str]) -> str:
        """Return the source that fills ``registry`` with the entries.

        Args:
            called: the names that definitions have, where they aren't their own.
        """
        tables = (("entries", self.entries), ("sections", self.sections), ("readings", self.readings))
        lines = [
            f"registry.{table}[{name!r}] = {self._write(value, called)}"
            for table, values in tables
            for name, value in values.items()
        ]
        return "\n".join(lines) + "\n"

    def _write(self, value: Any, called: Mapping[Place, str]) -> str:
        """Return the source of a value that entries are made of."""
        if isinstance(value, partial):
            args = ", ".join(self._write(each, called) for each in value.args)
            return f"lambda: {self._write(value.func, called)}({args})"
        if isinstance(value, frozenset):
            return f"frozenset({sorted(value)!r})"
        if is_dataclass(value) and not isinstance(value, type):
            unsaid = UNSAID if isinstance(value, Kind) else ()
            given = [
                (one.name, getattr(value, one.name), one.default) for one in fields(value) if one.name not in unsaid
            ]
            own = ", ".join(f"{key}={self._write(each, called)}" for key, each, default in given if each != default)
            return f"{self._write(type(value), called)}({own})"
        if callable(value):
            place = str(value.__module__), str(value.__name__)
            self.needed.append(place)
            return called.get(place, place[1])
        return repr(value)


def names(config: Any, options: list[GluConfig]) -> set[str]:
    """Return the activations that a config names, those of its experts and mixes among them."""
    found = set(activations_in(config.to_dict()))
    for entry in options:
        experts = entry.expert_options
        found |= {entry.activation} if entry.activation else set()
        found |= {group.name for group in (*experts.experts, *experts.always_on)} if experts else set()
        found |= set((entry.mix or {}).get("functions", ()))
    return {name.removeprefix("ungated_") for name in found}


def closed(given: set[str]) -> Iterator[str]:
    """Yield names, what is left of them without some of their prefixes, and the gates of all these."""
    for name in given:
        reading = registry.read(name)
        if reading is None:
            continue
        yield name
        parts = [*reading.wrappers, reading.mix] if reading.mix else [*reading.wrappers]
        for chosen in chain.from_iterable(combinations(parts, size) for size in range(len(parts) + 1)):
            part = "".join(chosen) + reading.base
            entry = registry.find(part)
            yield part
            if entry is not None and entry.gate is not None:
                yield from closed({entry.gate} - {name})
