"""What ``hf-glu steer`` may be told, and the texts that it reads."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_glu.bench.options import option
from hf_glu.checkpoint.loading import read_texts
from hf_glu.config.section import is_count
from hf_glu.errors import DataError, OptionError, UnknownNameError, nearest, shown
from hf_glu.instruments.steering import METHODS

FEWEST = 8  # texts of a class: half of them to fit on, half to judge by
MOST_DOSES = 101


@dataclass(frozen=True, kw_only=True)
class SteerOptions:
    """The options of a measurement of steering.

    Raises:
        OptionError, UnknownNameError: one that can't be.
    """

    dose: str = option("-2:2:9", "Strengths: FROM:TO:COUNT, or such as -1,0,1.")
    method: str = option("diffmean", "diffmean, pca, probe or learned.")
    layers: str | None = option(None, "Which layers' gates, such as '8-20'. All.")
    slopes: bool = option(False, "Fit slopes, too.")
    classifier: str | None = option(
        None, "A text classifier that scores (folder or Hub id); a probe on held-out texts."
    )
    label: str | None = option(None, "Its label that is the target. The last one.")
    neutral: str | None = option(None, "File of texts for perplexity; the held-out texts.")
    prompts: str | None = option(None, "File of prompts; first words of held-out texts.")
    samples: int = option(16, "Prompts that are gone on with at each strength.")
    tokens: int = option(24, "Tokens that are generated of each.")
    seeds: str = option("0", "Splits of the texts, such as 0,1,2.")
    budget: float = option(2.0, "Perplexity, times the unsteered model's, that areas go to.")
    stretch: bool = option(False, "Multiply the gates' strengths until the budget is spent.")
    peers: bool = option(True, "Measure a prompt and the residual stream, too.")
    batch_size: int = option(16, "Texts of one forward pass.")

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UnknownNameError(f"unknown method {self.method!r}; {nearest(self.method, METHODS)}")
        for name in ("samples", "tokens", "batch_size"):
            if not is_count(getattr(self, name), 100_000, 1):
                raise OptionError(f"{name} is a number from 1 on, got {shown(getattr(self, name))}")
        if not 1 < self.budget < math.inf:
            raise OptionError(f"budget is how many times the perplexity may grow, above 1, got {self.budget}")
        if self.label is not None and self.classifier is None:
            raise OptionError(f"label={self.label!r} is one of a classifier's: give --classifier, too")
        self.strengths()
        self.splits()

    def strengths(self) -> list[float]:
        """Return the strengths in order, 0 among them."""
        try:
            if ":" in self.dose:
                low, high, count = self.dose.split(":")
                first, last, steps = float(low), float(high), int(count)
                if not 2 <= steps <= MOST_DOSES:
                    raise ValueError
                found = [first + (last - first) * at / (steps - 1) for at in range(steps)]
            else:
                found = [float(part) for part in self.dose.split(",")]
            if not all(map(math.isfinite, found)) or len(found) > MOST_DOSES:
                raise ValueError
        except ValueError:
            raise OptionError(
                f"dose is FROM:TO:COUNT with 2 to {MOST_DOSES} strengths, such as -2:2:9, or a list, such as -1,0,1; "
                f"got {shown(self.dose)}"
            ) from None
        rounded = sorted({round(each, 9) for each in (*found, 0.0)})
        if len(rounded) < 2:
            raise OptionError(f"dose needs a strength beside 0, got {shown(self.dose)}")
        return rounded

    def splits(self) -> list[int]:
        """Return the seeds."""
        parts = self.seeds.split(",")
        if not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
            raise OptionError(f"seeds are numbers such as 0,1,2, got {shown(self.seeds)}")
        return [int(part) for part in parts]


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """The texts of one split: those that ways of steering are fitted on, and those that are held out."""

    fitted: tuple[list[str], list[str]]
    held_out: tuple[list[str], list[str]]


def read_sides(positive: Path, negative: Path) -> tuple[list[str], list[str]]:
    """Return the texts of both classes, a text a line, as many of the one as of the other.

    Raises:
        CheckpointError, DataError: a file that can't be read, or has too few texts.
    """
    sides = read_texts(positive), read_texts(negative)
    for path, side in zip((positive, negative), sides, strict=True):
        if len(side) < FEWEST:
            raise DataError(f"{path} has {len(side)} texts, and {FEWEST} at least are needed: half are held out")
    count = min(map(len, sides))
    return sides[0][:count], sides[1][:count]


def split(sides: Sequence[Sequence[str]], seed: int) -> Texts:
    """Return both classes in two halves, drawn by a seed."""
    halves = []
    for side in sides:
        order = list(side)
        random.Random(seed).shuffle(order)
        halves.append((order[: len(order) // 2], order[len(order) // 2 :]))
    (one, kept), (other, held) = halves
    return Texts(fitted=(one, other), held_out=(kept, held))
