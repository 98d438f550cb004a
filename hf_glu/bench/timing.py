"""Interleaved timing: a shared machine slows all contenders of a round alike, so ratios are taken within rounds.

R rounds run every contender once each, in an order that rotates from round to round, and is reversed in every second
one: a contender that always came after the same other one would always find the caches as that one leaves them.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hf_glu.errors import OptionError, UnknownNameError, nearest

Clock = Callable[[], float]
SHORT = 0.02  # seconds: a shorter turn is repeated until it lasts so long
MOST_REPEATS = 1000


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The median and the quartiles of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarise at least one value."""
        found = list(values)
        if len(found) == 1:
            return cls(median=found[0], low=found[0], high=found[0])
        low, median, high = statistics.quantiles(found, n=4, method="inclusive")
        return cls(median=median, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The seconds of each contender in each round.

    Attributes:
        seconds: of one call, by contender and round.
    """

    seconds: dict[str, tuple[float, ...]]

    def spread(self, name: str) -> Spread:
        """Return the spread of a contender's seconds."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, peer: str) -> Spread:
        """Return the spread over the rounds r of seconds[name][r] / seconds[peer][r].

        Raises:
            UnknownNameError: there is no such contender.
        """
        for each in (name, peer):
            if each not in self.seconds:
                raise UnknownNameError(f"no contender {each!r} was timed; {nearest(each, self.seconds)}")
        return Spread.of(a / b for a, b in zip(self.seconds[name], self.seconds[peer], strict=True))

    def fastest(self, names: Iterable[str]) -> str:
        """Return the name of the contender with the least median."""
        return min(names, key=lambda name: self.spread(name).median)


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 9,
    warmup: int = 2,
    repeats: int | None = None,
    clock: Clock = time.perf_counter,
) -> Timing:
    """Time contenders round by round, each once in a round.

    Args:
        contenders: by name, what is timed.
        rounds: R.
        warmup: calls of each before the first round.
        repeats: calls in a contender's turn, of which the mean counts; None: as many as take `SHORT`.
        clock: returns seconds.

    Raises:
        OptionError: there is no contender, or less than one round.
    """
    if not contenders or rounds < 1 or warmup < 0:
        raise OptionError(f"timing needs a contender and a round, got {len(contenders)} contenders, {rounds} rounds")
    counts = {}
    for name, call in contenders.items():
        last = min((_turn(call, 1, clock) for _ in range(warmup)), default=0.0)
        enough = MOST_REPEATS if last <= 0 else min(MOST_REPEATS, round(SHORT / last))
        counts[name] = repeats or (max(1, enough) if warmup else 1)
    names, seconds = list(contenders), {name: [0.0] * rounds for name in contenders}
    with _no_collection():
        for number in range(rounds):
            turns = [*names[number % len(names) :], *names[: number % len(names)]]
            for name in reversed(turns) if number % 2 else turns:
                seconds[name][number] = _turn(contenders[name], counts[name], clock)
    return Timing(seconds={name: tuple(values) for name, values in seconds.items()})


def _turn(call: Callable[[], object], repeats: int, clock: Clock) -> float:
    wait()
    start = clock()
    for _ in range(repeats):
        call()
    wait()
    return (clock() - start) / repeats


def wait() -> None:
    """Wait until the accelerator, if one is in use, has done all that it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the rounds."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
