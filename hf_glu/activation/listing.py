"""The registry as a listing: for ``hf_glu.activations()``, the command line and the README's table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_glu.activation.elementwise import elementwise_names
from hf_glu.config.registry import Activation, Derived, registry
from hf_glu.config.showing import Shown, ShownTable


@dataclass(frozen=True, kw_only=True, repr=False)
class Listing(Shown):
    """Every gated activation by name, the families of names, and the elementwise names N that these take."""

    entries: tuple[Activation, ...]
    rules: tuple[Derived, ...]
    elementwise: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the listing as plain data."""
        return {
            "activations": [entry.to_dict() for entry in self.entries],
            "rules": [rule.to_dict() for rule in self.rules],
            "elementwise": list(self.elementwise),
        }

    def _table(self) -> ShownTable:
        rows = [(entry.name, entry.equation, entry.paper) for entry in self.entries]
        rows += [(rule.pattern, rule.equation, rule.paper) for rule in self.rules]
        title, notes = "Gated activations, [g | u] = gate and up halves", ("N: " + ", ".join(self.elementwise),)
        return ShownTable(title=title, columns=("name", "value", "source"), rows=rows, notes=notes, whole=True)

    def markdown(self) -> str:
        """Return the listing as the README's table."""
        rows = [(f"`{entry.name}`", f"`{entry.equation}`", entry.paper) for entry in self.entries]
        rows += [(f"`{rule.pattern}`", f"`{rule.equation}`", rule.paper) for rule in self.rules]
        lines = ["| name | value | source |", "|---|---|---|"]
        return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def activations() -> Listing:
    """Return all activations that hf_glu adds to Transformers' ``ACT2FN``."""
    return Listing(entries=tuple(registry), rules=registry.families, elementwise=tuple(elementwise_names()))
