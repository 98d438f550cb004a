"""What all pieces share: a count of what was compared, the comparison itself, and a command line."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

# dtype -> how many ulps of the largest value a result may be off beyond what the plain formula itself is off
ULPS = {torch.float64: 512, torch.float32: 64, torch.bfloat16: 4, torch.float16: 5}


@dataclass
class Tally:
    """What came of a case.

    Attributes:
        comparisons: tensors and facts compared.
        undecided: comparisons that rounding decides, left out.
        refused: one of hf_glu's own errors was the answer.
        bad: what was wrong, a line each.
    """

    comparisons: int = 0
    undecided: int = 0
    refused: int = 0
    bad: list[str] = field(default_factory=list)

    def expect(self, right: bool, said: str) -> None:
        """Count one fact."""
        self.comparisons += 1
        if not right:
            self.bad.append(said)

    def close(self, label: str, got: Tensor, reference: Tensor, low: Tensor, dtype: torch.dtype) -> None:
        """Count one tensor against its float64 reference; ``low`` is the plain formula in ``dtype``."""
        self.expect(got.shape == reference.shape, f"{label}: shape {list(got.shape)}, not {list(reference.shape)}")
        if got.shape == reference.shape and got.numel():
            if not low.isfinite().all():
                self.undecided += 1
                return
            off = largest(got.double() - reference)
            scale = max(1.0, largest(reference))
            most = 4 * largest(low.double() - reference) + ULPS[dtype] * torch.finfo(dtype).eps * scale
            self.expect(off <= most, f"{label}: off by {off:.3g} of {scale:.3g}, at most {most:.3g} is right")

    def same(self, label: str, got: Tensor, reference: Tensor, most: float = 0.0) -> None:
        """Count one tensor that may differ from another by ``most`` of its largest value; 0: bit by bit."""
        off = largest(got.double() - reference.double()) if got.shape == reference.shape else float("inf")
        scale = max(1.0, largest(reference)) if got.shape == reference.shape else 1.0
        self.expect(off <= most * scale, f"{label}: off by {off:.3g} of {scale:.3g}")

    def add(self, other: Tally) -> None:
        """Add another case's."""
        self.comparisons += other.comparisons
        self.undecided += other.undecided
        self.refused += other.refused
        self.bad += other.bad


def largest(difference: Tensor) -> float:
    """Return max |difference|, infinity where one is no number."""
    return float(difference.detach().abs().nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


def run(
    name: str,
    draw: Callable[[Random], Any],
    check: Callable[[Any], Tally],
    count: int,
    seed: int = 0,
    finish: Callable[[], Tally] = Tally,
) -> Tally:
    """Try ``count`` cases, print every bad one, and return what came of all; ``finish`` checks what was left."""
    total, cases, began = Tally(), 0, time.monotonic()
    for number in range(seed, seed + count):
        case = draw(Random(number))
        found = attempt(check, case)
        for line in found.bad:
            print(f"BAD {name} --seed {number} --count 1\n    {case}\n    {line}", flush=True)
        cases += bool(found.bad)
        total.add(found)
    last = finish()
    for line in last.bad:
        print(f"BAD {name}\n    {line}", flush=True)
    cases += len(last.bad)
    total.add(last)
    print(
        f"{name}: {count} cases, {total.comparisons} comparisons, {total.undecided} undecided, "
        f"{total.refused} refused, {cases} bad, {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return total


def attempt(check: Callable[[Any], Tally], case: Any) -> Tally:
    """Check a case; an error that it lets through is bad."""
    try:
        return check(case)
    except Exception as error:
        places = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{place.filename.rpartition('/')[2]}:{place.lineno}" for place in reversed(places))
        return Tally(comparisons=1, bad=[f"{type(error).__name__}: {str(error)[:300]} @ {where}"])


def main(
    name: str,
    draw: Callable[[Random], Any],
    check: Callable[[Any], Tally],
    count: int,
    finish: Callable[[], Tally] = Tally,
) -> None:
    """Run a piece from the command line; exit with 1 if anything was bad."""
    parser = argparse.ArgumentParser(prog=f"python -m recipes.fuzz.{name}", description=f"{count} cases unless told.")
    parser.add_argument("--count", type=int, default=count, help="how many cases")
    parser.add_argument("--seed", type=int, default=0, help="the first case's number")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    raise SystemExit(bool(run(name, draw, check, arguments.count, arguments.seed, finish).bad))
