"""The results of a bench: the machine, and a row for each contender with its ratios and their targets."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import geometric_mean

import torch

from hf_glu.bench.options import Shape
from hf_glu.bench.timing import Spread
from hf_glu.checkpoint.jsonio import JsonObject


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """A contender's measurements in one cell.

    Attributes:
        bench: the bench's name.
        cell: its shapes, dtype and pass.
        contender: what was measured.
        seconds: of one call.
        peer: what it is compared with; None: nothing.
        ratio: of its seconds to its peer's, round by round.
        target: the most that the median of ``ratio`` may be; None: no claim.
        limit: the most that the median of ``seconds`` may be; None: no claim.
        saved_bytes: what autograd keeps for the backward pass, or the peak of a call; None: neither.
        saved_peer, saved_ratio, saved_target: the same for these bytes.
        tokens: that a call processes; None: it isn't counted in tokens.
        facts: further numbers about it, by what they are.
    """

    bench: str
    cell: Shape
    contender: str
    seconds: Spread
    peer: str | None = None
    ratio: Spread | None = None
    target: float | None = None
    limit: float | None = None
    saved_bytes: int | None = None
    saved_peer: str | None = None
    saved_ratio: float | None = None
    saved_target: float | None = None
    tokens: int | None = None
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the targets of the time are met; None: there is none."""
        verdicts = []
        if self.target is not None and self.ratio is not None:
            verdicts.append(self.ratio.median <= self.target)
        if self.limit is not None:
            verdicts.append(self.seconds.median <= self.limit)
        return all(verdicts) if verdicts else None

    @property
    def saved_met(self) -> bool | None:
        """Whether the target of the kept bytes is met; None: there is none."""
        known = self.saved_target is not None and self.saved_ratio is not None
        return self.saved_ratio <= self.saved_target if known else None  # type: ignore[operator]

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second, by the median; None: they aren't counted."""
        return None if self.tokens is None else self.tokens / self.seconds.median

    def to_dict(self) -> JsonObject:
        """Return the row as plain data."""
        more = {} if self.tokens is None else {"tokens_per_second": self.tokens_per_second}
        return {**asdict(self), **more, "met": self.met, "saved_met": self.saved_met}


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A contender's mean ratio over all cells.

    Attributes:
        contender: what was measured.
        ratio: geometric mean of the cells' median ratios.
        target: the most that it may be.
    """

    contender: str
    ratio: float
    target: float

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.ratio <= self.target

    def to_dict(self) -> JsonObject:
        """Return the mean as plain data."""
        return {**asdict(self), "met": self.met}


def mean_ratios(rows: Iterable[BenchRow], targets: Mapping[str, float]) -> tuple[Mean, ...]:
    """Return the mean ratios of the contenders that have a target for them."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.ratio is not None:
            found.setdefault(row.contender, []).append(row.ratio.median)
    return tuple(
        Mean(contender=name, ratio=geometric_mean(found[name]), target=target)
        for name, target in targets.items()
        if name in found
    )


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What couldn't be measured in a run that goes on without it.

    Attributes:
        cell: its shapes, dtype and pass.
        contender: which; None: none of the cell.
        why: in a line.
    """

    cell: Shape
    contender: str | None
    why: str


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """The results of a bench.

    Attributes:
        bench: its name.
        machine: what it ran on.
        rows: in the order in which they were measured.
        means: over all cells, of those contenders that claim one.
        failures: what is missing.
    """

    bench: str
    machine: dict[str, int | str]
    rows: tuple[BenchRow, ...]
    means: tuple[Mean, ...] = ()
    failures: tuple[Failure, ...] = ()

    @property
    def summary(self) -> str:
        """How many targets are met, of time and of memory."""
        verdicts = [met for row in self.rows for met in (row.met, row.saved_met) if met is not None]
        verdicts += [mean.met for mean in self.means]
        return f"{sum(verdicts)} of {len(verdicts)} targets met"

    def to_dict(self) -> JsonObject:
        """Return the result as plain data."""
        rows = [row.to_dict() for row in self.rows]
        means = [mean.to_dict() for mean in self.means]
        failures = [asdict(failure) for failure in self.failures]
        more = {"failures": failures} if failures else {}
        found = {"bench": self.bench, "summary": self.summary, "machine": self.machine, "rows": rows, "means": means}
        return {**found, **more}


def physical_cores() -> int:
    """Return the number of physical cores that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    usable = os.sched_getaffinity(0)
    cores = {_core(number) for number in usable}
    return len(usable) if None in cores else len(cores)


def _core(number: int) -> tuple[str, str] | None:
    topology = Path(f"/sys/devices/system/cpu/cpu{number}/topology")
    try:
        return (topology / "physical_package_id").read_text().strip(), (topology / "core_id").read_text().strip()
    except OSError:
        return None


def machine(device: str = "cpu") -> dict[str, int | str]:
    """Describe what measurements depend on: processor, threads, device, versions."""
    device = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return {
        "cpu": _cpu_model(),
        "cores": physical_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "device": device,
        "system": platform.system(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "active"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
