"""The registry as a listing: for ``hf_glu.activations()``, the command line and the README's table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_glu.activation.elementwise import elementwise_names
from hf_glu.activation.gated import SHAZEER
from hf_glu.registry import Activation, registry


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Every gated activation by name, and the elementwise names N of the rule ``N_glu``."""

    entries: tuple[Activation, ...]
    elementwise: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the listing as plain data."""
        return {"activations": [entry.to_dict() for entry in self.entries], "elementwise": list(self.elementwise)}

    def markdown(self) -> str:
        """Return the listing as the README's table."""
        rows = [(f"`{entry.name}`", f"`{entry.equation}`", entry.paper) for entry in self.entries]
        rows.append(("`N_glu`", "`N(g) * u` for any elementwise N in `ACT2FN`", SHAZEER))
        lines = ["| name | value | source |", "|---|---|---|"]
        return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def activations() -> Listing:
    """Return all activations that hf_glu adds to Transformers' ``ACT2FN``."""
    return Listing(entries=tuple(registry), elementwise=tuple(elementwise_names()))
