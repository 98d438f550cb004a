"""Running a bench: one cell after the other, the contenders of a cell interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hf_glu.bench.memory import peak_bytes, saved_bytes
from hf_glu.bench.options import BENCHES, DTYPE_NAMES, BenchOptions, Shape, check_name
from hf_glu.bench.result import BenchResult, BenchRow, Failure, machine, mean_ratios, physical_cores
from hf_glu.bench.timing import Timing, interleave
from hf_glu.checkpoint.config_file import first_line
from hf_glu.errors import OptionError, nearest

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something that is measured: a call, and how its memory is measured.

    Attributes:
        call: what is timed.
        forward: the forward pass alone, where there is a backward pass to keep tensors for.
        parameters: which don't count as kept.
        peak: whether its memory is the most that a call has at a time, and not what ``forward`` keeps.
        tokens: that a call processes; None: it isn't counted in tokens.
        facts: further numbers about it, by what they are.
    """

    call: Callable[[], object]
    forward: Callable[[], Tensor] | None = None
    parameters: tuple[Tensor, ...] = ()
    peak: bool = False
    tokens: int | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a bench claims of a contender: largest ratios to its peers.

    Attributes:
        peers: the contenders of which the fastest in the run is the peer.
        target: the largest ratio of their times; None: shown without a claim.
        limit: the most seconds that a call may take, on whatever machine.
        saved_peers, saved_target: the same for what is kept for the backward pass, with the leanest.
    """

    peers: tuple[str, ...]
    target: float | None = None
    limit: float | None = None
    saved_peers: tuple[str, ...] = ()
    saved_target: float | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Contenders that are measured side by side.

    Attributes:
        shape: sizes, dtype and pass, for the reader.
        build: makes the contenders when it is their turn.
        claims: by contender.
    """

    shape: Shape
    build: Callable[[], Mapping[str, Contender]]
    claims: Mapping[str, Claim]


def run(
    name: str,
    options: BenchOptions | None = None,
    on_cell: Callable[[Cell], object] | None = None,
    until: float | None = None,
) -> BenchResult:
    """Run a bench.

    Args:
        name: the bench.
        options: its options.
        on_cell: is told of each cell before it is measured.
        until: the time of ``time.monotonic`` after which no cell is begun; what fails is then left out, and said.

    Raises:
        UnknownNameError: there is no such bench.
        OptionError: an option that can't be used.
    """
    check_name(name)
    options = options or BenchOptions()
    check_device(options.device)
    rows: list[BenchRow] = []
    failures: list[Failure] = []
    module = import_module(BENCHES[name])
    with _threads(options.threads or physical_cores()):
        for cell in module.cells(options):
            if until is not None and time.monotonic() > until:
                failures.append(Failure(cell=cell.shape, contender=None, why="not begun: the time was up"))
                continue
            if on_cell:
                on_cell(cell)
            if until is None:
                rows += measure(name, cell, options)
            else:
                rows += measure_what_works(name, cell, options, failures)
        means = mean_ratios(rows, getattr(module, "MEANS", {}))
        found: dict[str, Any] = {"rows": tuple(rows), "means": means, "failures": tuple(failures)}
        return BenchResult(bench=name, machine=machine(options.device), **found)


def check_device(name: str) -> None:
    """Raise OptionError unless there is such a device."""
    known = ["cpu"]
    if torch.accelerator.is_available():
        known.append(str(torch.accelerator.current_accelerator()))
    if name not in known:
        raise OptionError(f"there is no device {name!r} here; {nearest(name, known)}")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_what_works(bench: str, cell: Cell, options: BenchOptions, failures: list[Failure]) -> list[BenchRow]:
    """Measure the contenders that a call of each has not shown to fail; add the others to ``failures``."""

    def build() -> dict[str, Contender]:
        working = {}
        for name, contender in cell.build().items():
            try:
                contender.call()
                working[name] = contender
            except Exception as error:  # of any kind: the rest is still worth its time
                failures.append(Failure(cell=cell.shape, contender=name, why=first_line(error)))
        return working

    try:
        return measure(bench, replace(cell, build=build), options)
    except Exception as error:
        failures.append(Failure(cell=cell.shape, contender=None, why=first_line(error)))
        return []


def measure(bench: str, cell: Cell, options: BenchOptions) -> list[BenchRow]:
    """Measure the contenders of a cell; return a row for each."""
    with torch.device(options.device) if options.device != "cpu" else nullcontext():
        contenders = cell.build()
    saved = {name: saved_bytes(c.forward, c.parameters) for name, c in contenders.items() if c.forward}
    calls = {name: contender.call for name, contender in contenders.items()}
    timing = interleave(calls, rounds=options.rounds, warmup=options.warmup)
    saved |= {name: peak_bytes(contender.call) for name, contender in contenders.items() if contender.peak}
    return [_row(bench, cell, name, timing, saved, c) for name, c in contenders.items()]


def _row(bench: str, cell: Cell, name: str, timing: Timing, saved: Mapping[str, int], contender: Contender) -> BenchRow:
    facts = dict(contender.facts)
    row: dict[str, Any] = {"seconds": timing.spread(name), "saved_bytes": saved.get(name), "facts": facts}
    row["tokens"] = contender.tokens
    claim = cell.claims.get(name)
    if claim is not None:
        peer = timing.fastest(each for each in claim.peers if each in timing.seconds)
        row |= {"peer": peer, "ratio": timing.ratio(name, peer), "target": claim.target, "limit": claim.limit}
        lean = min((each for each in claim.saved_peers if each in saved), key=saved.__getitem__, default=None)
        if lean is not None and name in saved:
            ratio = saved[name] / saved[lean]
            row |= {"saved_peer": lean, "saved_ratio": ratio, "saved_target": claim.saved_target}
    return BenchRow(bench=bench, cell=cell.shape, contender=name, **row)
