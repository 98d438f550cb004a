"""What the sliders of the page say, as the modulation that it means.

A threshold and a slope that are the same for all channels of some layers, and presets with strengths, are one sum:

    y = N(slope (g - threshold)) [* u],   threshold = T + sum_i s_i t_i,   slope = S exp(sum_i s_i l_i)

Shapes: W channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_glu.ffn.sites import Site
from hf_glu.instruments.steering.modulating import GateSteering
from hf_glu.instruments.steering.places import named_sites, sample
from hf_glu.publishing.modulations import GateModulation


@dataclass(frozen=True, kw_only=True)
class PlaySettings:
    """What the page is set to.

    Attributes:
        threshold, slope: T and S, of all channels of the layers from ``first`` to ``last``.
        first, last: layers; None: the model's last one.
        strengths: s of each preset, by its name.
    """

    threshold: float = 0.0
    slope: float = 1.0
    first: int = 0
    last: int | None = None
    strengths: Mapping[str, float] = field(default_factory=dict)

    @property
    def by_hand(self) -> bool:
        """Whether threshold and slope do anything."""
        return (self.threshold, self.slope) != (0.0, 1.0)

    @property
    def neutral(self) -> bool:
        """Whether nothing is steered."""
        return not self.by_hand and not any(self.strengths.values())

    def chosen(self, places: Mapping[str, Site]) -> dict[str, Site]:
        """Return those of a model's gates whose layers threshold and slope are of."""
        last = math.inf if self.last is None else self.last
        low, high = sorted((self.first, last))
        return {name: site for name, site in places.items() if low <= site.layer <= high}

    def modulation(self, model: Any, presets: Mapping[str, GateModulation]) -> GateModulation | None:
        """Return the one modulation of ``model`` that the settings mean, None where they are neutral."""
        parts = [strength * presets[name] for name, strength in self.strengths.items() if strength]
        places = named_sites(model) if self.by_hand else {}
        if chosen := self.chosen(places):
            parts.insert(0, GateModulation.of(self._hand(model, chosen)))
        if not parts:
            return None
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _hand(self, model: Any, places: Mapping[str, Site]) -> GateSteering:
        slopes = {} if self.slope == 1.0 else {name: math.log(self.slope) for name in places}
        return GateSteering(
            thresholds={name: torch.full((site.width,), self.threshold) for name, site in places.items()},
            log_slopes={name: torch.full((places[name].width,), value) for name, value in slopes.items()},
            samples={name: sample(site) for name, site in places.items()},
            model=type(model).__name__,
            method=f"by hand, threshold {self.threshold:g}, slope {self.slope:g}",
        )

    def code(self, layers: int, file: str, presets: Mapping[str, str]) -> str:
        """Return Python that steers a model in this way.

        Args:
            layers: of the model.
            file: name of the file that the settings are exported to.
            presets: where each preset was loaded from, by its name.
        """
        if self.neutral:
            return "import hf_glu\n\n# nothing is steered: move a slider"
        lines = ["import hf_glu", "", f'steered = hf_glu.GateModulation.load("{file}")']
        lines += ["with steered.on(model):", "    model.generate(...)"]
        used = [f"{strength:g} * {presets[name]}" for name, strength in self.strengths.items() if strength]
        if used:
            lines += ["", f"# in it: {', '.join(used)}"]
        if self.by_hand:
            low, high = sorted((self.first, layers - 1 if self.last is None else self.last))
            chosen = "" if (low, high) == (0, layers - 1) else f', layers="{low}-{high}"'
            said = f"threshold={self.threshold:g}, slope={self.slope:g}{chosen}"
            lines += ["", "# threshold and slope alone, without the file:", f"with hf_glu.modulation(model, {said}):"]
            lines += ["    model.generate(...)"]
        return "\n".join(lines)
