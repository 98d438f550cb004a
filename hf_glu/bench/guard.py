"""Comparing a run of benches with a committed one: what has become slower, or keeps more memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.errors import DataError

TOLERANCE = 0.10


@dataclass(frozen=True, kw_only=True)
class RatioChange:
    """A contender's ratio to its peer, in both runs.

    Attributes:
        what: bench, cell and contender.
        of: ``time`` or ``memory``.
        before, now: the ratios to the same peer.
        worse: whether it has grown by more than the tolerance.
    """

    what: str
    of: str
    before: float
    now: float
    worse: bool


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """The ratios that both runs have.

    Attributes:
        changes: in the order of the new run.
        tolerance: the share by which a ratio may grow.
        other_machine: whether the two ran on different processors.
    """

    changes: tuple[RatioChange, ...]
    tolerance: float
    other_machine: bool

    @property
    def same(self) -> bool:
        """Whether nothing has become worse."""
        return not any(change.worse for change in self.changes)

    def to_dict(self) -> JsonObject:
        """Return the comparison as plain data."""
        return {**asdict(self), "same": self.same}


def read_results(path: Path) -> JsonObject:
    """Read a file that ``hf-glu bench --save`` wrote.

    Raises:
        DataError: it is no such file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("benches"), list):
        raise DataError(f"{path} has no benches: give what `hf-glu bench NAME --save FILE` wrote")
    return data


def compare(before: JsonObject, now: JsonObject, tolerance: float = TOLERANCE) -> Guarded:
    """Compare the ratios of two runs.

    Raises:
        DataError: they have none in common.
    """
    known = dict(_ratios(before))
    changes = tuple(
        RatioChange(what=key[0], of=key[1], before=known[key], now=ratio, worse=ratio > known[key] * (1 + tolerance))
        for key, ratio in _ratios(now)
        if key in known
    )
    if not changes:
        raise DataError("the two runs have no ratio in common: measure the same bench, sizes and dtype")
    machines = [data["benches"][0]["machine"].get("cpu") for data in (before, now)]
    return Guarded(changes=changes, tolerance=tolerance, other_machine=machines[0] != machines[1])


def _ratios(data: JsonObject) -> Iterator[tuple[tuple[str, str], float]]:
    for bench in data["benches"]:
        for row in bench["rows"]:
            cell = ", ".join(f"{key} {value}" for key, value in row["cell"].items())
            what = f"{bench['bench']}: {row['contender']} ({cell})"
            if row["ratio"] is not None:
                yield (what, "time"), row["ratio"]["median"]
            if row["saved_ratio"] is not None:
                yield (what, "memory"), row["saved_ratio"]
