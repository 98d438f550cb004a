"""What a conversion did, with what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_glu.conversion.planning import Plan, Step


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteReport:
    """One site: the step, and the relative error of the FFN's output on the inputs it got (None: not measured)."""

    step: Step
    relative_error: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**self.step.to_dict(), "relative_error": self.relative_error}


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """A conversion that was carried out.

    Attributes:
        plan: what was planned.
        sites: what came of each site.
        differences: max |difference| of each output of the model, before and after (None: not measured).
    """

    plan: Plan
    sites: tuple[SiteReport, ...]
    differences: dict[str, float] | None

    @property
    def max_abs_difference(self) -> float | None:
        """The largest difference of any output."""
        return max(self.differences.values()) if self.differences else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            **self.plan.to_dict(),
            "max_abs_difference": self.max_abs_difference,
            "differences": self.differences,
            "sites": [site.to_dict() for site in self.sites],
        }
