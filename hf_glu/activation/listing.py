"""The registry as a listing: for ``hf_glu.activations()``, the command line and the README's table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_glu.activation import registry
from hf_glu.activation.stock import elementwise_names
from hf_glu.config.registry import Activation, Derived
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
        title, columns = "Gated activations, [g | u] = gate and up halves", ("name", "value", "source")
        return ShownTable(title=title, columns=columns, rows=rows, notes=notes(self.to_dict()), whole=True)

    def markdown(self) -> str:
        """Return the listing as the README's table."""
        rows = [(f"`{entry.name}`", f"`{entry.equation}`", entry.paper) for entry in self.entries]
        rows += [(f"`{rule.pattern}`", f"`{rule.equation}`", rule.paper) for rule in self.rules]
        lines = ["| name | value | source |", "|---|---|---|"]
        return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def notes(listing: Mapping[str, Any]) -> tuple[str, str]:
    """Return the lines below a listing's table: what N may be, and which options there are."""
    options = [
        f"{rule['pattern']}: {section} ({', '.join(defaults)})"
        for rule in listing["rules"]
        for section, defaults in rule["options"].items()
    ]
    return "N: " + ", ".join(listing["elementwise"]), "options in config.hf_glu: " + "; ".join(options)


def activations() -> Listing:
    """Return all activations that hf_glu adds to Transformers' ``ACT2FN``."""
    return Listing(entries=tuple(registry), rules=registry.families, elementwise=tuple(elementwise_names()))
