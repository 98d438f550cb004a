"""What `hf_glu.sparsify` did, with what was measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hf_glu.config.showing import Shown, ShownTable


@dataclass(frozen=True, kw_only=True)
class SparseSite:
    """What one FFN leaves out.

    Attributes:
        name: of the FFN.
        inputs, units: shares that are kept.
        relative_error: of its output on held-out tokens, a root mean square.
    """

    name: str
    inputs: float
    units: float
    relative_error: float


@dataclass(frozen=True, kw_only=True, repr=False)
class SparsityReport(Shown):
    """What `hf_glu.sparsify` did.

    Attributes:
        method, keep: as asked for.
        read: share of the FFNs' weights that a token reads, on the calibration.
        sites: of each FFN, its shares and error.
        perplexity: of a causal language model on held-out calibration texts, ``before`` and ``after``, on so many
            ``tokens``; None: the calibration was no text, or the model another.
        kernel: how one token is computed here: ``compiled``, ``torch`` (no compiler; slower) or ``dense`` (zeros are
            multiplied: not on a CPU, or in another dtype than float32 and bfloat16).
        prefill: how a text is read: ``masked``, as it would be token by token, at a dense FFN's cost.
    """

    method: str
    keep: float
    read: float
    sites: tuple[SparseSite, ...]
    perplexity: dict[str, float] | None
    kernel: str
    prefill: str = "masked"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**asdict(self), "sites": [asdict(site) for site in self.sites]}

    def _table(self) -> ShownTable:
        rows = [
            (each.name, f"{each.inputs:.0%}", f"{each.units:.0%}", f"{each.relative_error:.1%}") for each in self.sites
        ]
        notes = [
            f"a token reads {self.read:.0%} of the FFNs' weights; one token: {self.kernel}, a text: {self.prefill}"
        ]
        if found := self.perplexity:
            change = found["after"] / found["before"] - 1
            notes.append(
                f"perplexity {found['before']:.2f} -> {found['after']:.2f} ({change:+.1%}) on {found['tokens']:,} "
                "held-out tokens"
            )
        return ShownTable(
            title=f"{len(self.sites)} FFNs, {self.method}", rows=rows, notes=tuple(notes),
            columns=("site", "#inputs kept", "#units kept", "#relative error"),
        )  # fmt: skip
