"""What a conversion did, with what was measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from hf_glu.config.showing import Shown, ShownTable, number
from hf_glu.conversion.fit.fitting import Fit
from hf_glu.conversion.steps import COLUMNS, Rows, Step

_COLUMNS = (*COLUMNS, "#relative error")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SiteReport(Shown):
    """One site; it holds numbers, not the site's modules.

    Attributes:
        step: what was planned.
        relative_error: of the FFN's output on the inputs that it got in the comparison (None: not measured).
        fit: relative errors on held-out calibration tokens, before and after fitting (None: not fitted).
    """

    step: Step
    relative_error: float | None
    fit: Fit | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", self.step.without_modules())

    def _table(self) -> ShownTable:
        return ShownTable(title=f"1 FFN to {self.step.target}", columns=_COLUMNS, rows=[self.row()])

    def row(self) -> tuple[str, ...]:
        """Return its row of a report's table."""
        error = number(self.relative_error) if self.fit is None else f"{self.fit.before:.1%} -> {self.fit.after:.1%}"
        return (*self.step.row(), error)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        fitted = asdict(self.fit) if self.fit else None
        return {**self.step.to_dict(), "relative_error": self.relative_error, "fit": fitted}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Report(Shown):
    """A conversion that was carried out; it holds numbers, and doesn't keep the model alive.

    Attributes:
        plan: what was planned.
        sites: what came of each site.
        differences: max |difference| of each output of the model, before and after (None: not measured).
        curves: site -> relative errors on held-out tokens with 1, 2, ... experts active, where units were divided.
        perplexity: of a causal language model on held-out calibration texts, ``before`` and ``after``, and of how many
            ``tokens`` (None: not measured).
        healing: the report of training by a teacher that followed (None: none did).
    """

    plan: Rows
    sites: tuple[SiteReport, ...]
    differences: dict[str, float] | None
    curves: dict[str, list[float]] = field(default_factory=dict)
    perplexity: dict[str, float] | None = None
    healing: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", self.plan.without_modules())

    def _table(self) -> ShownTable:
        done = "converted" if self.plan.changes else "already converted: nothing changed"
        difference = f"max |difference| of the model's outputs {number(self.max_abs_difference)}"
        return ShownTable(
            title=f"{len(self.sites)} FFNs ({self.plan.promise if self.sites else 'none'}), {done}", columns=_COLUMNS,
            rows=[site.row() for site in self.sites], notes=(self.plan.cost, difference),
        )  # fmt: skip

    @property
    def max_abs_difference(self) -> float | None:
        """The largest difference of any output."""
        return max(self.differences.values()) if self.differences else None

    @property
    def fit(self) -> dict[str, float] | None:
        """Mean relative errors of the fitted FFNs on held-out calibration tokens, before and after (None: no fit)."""
        fits = [site.fit for site in self.sites if site.fit]
        if not fits:
            return None
        return {"before": fmean(fit.before for fit in fits), "after": fmean(fit.after for fit in fits)}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            **self.plan.to_dict(),
            "fit": self.fit,
            "max_abs_difference": self.max_abs_difference,
            "differences": self.differences,
            **({"curves": self.curves} if self.curves else {}),
            **({"perplexity": self.perplexity} if self.perplexity else {}),
            **({"healing": self.healing} if self.healing else {}),
            "sites": [site.to_dict() for site in self.sites],
        }
