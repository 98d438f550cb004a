"""Sizes, budgets and seeds of the studies, as PROTOCOL.md has them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

TUNED = 100  # the seed that learning rates are chosen on
BASE = 200  # the seed of the model that pretraining goes on with
BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model from scratch, and what it is trained on.

    Attributes:
        layers, hidden, vocabulary: of the model, whose FFNs are 4 x hidden wide.
        steps, batch: of its training, in blocks of `BLOCK` tokens.
        lrs: learning rates to choose from; None: the preset's.
    """

    layers: int
    hidden: int
    vocabulary: int
    steps: int
    batch: int = 8
    lrs: tuple[float, ...] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a training."""
        return self.steps * self.batch * BLOCK


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a machine can do.

    Attributes:
        sizes: of language models, by name.
        seeds: how many.
        lrs: learning rates from scratch to choose from, where a size has none of its own.
        precision: of language models and tasks.
        recall: changes to the sizes of `recipes/memory.py`: what the recall tasks are trained for, each by its name.
        rows, own_rows: training and validation rows of a task, and of one among all of them.
        epochs: of a task.
        healing: steps that the model of equal parameters is healed for.
        tasks: of ``open_nlu``; None: all.
    """

    sizes: dict[str, Size]
    seeds: int
    lrs: tuple[float, ...]
    precision: str = "no"
    recall: dict[str, int]
    rows: tuple[int, int] = (1000, 1000)
    own_rows: tuple[int, int] = (500, 200)
    epochs: float = 2.0
    healing: int = 200
    tasks: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a study runs with.

    Attributes:
        preset: what the machine can do.
        size: the name of one of the preset's sizes.
        data: the folder that `fetch` wrote.
        output: the study's own folder.
        tell: is told of each run.
        pool: what carries runs out, several at once; None: one after the other.
    """

    preset: Preset
    size: str = ""
    data: Path
    output: Path
    tell: Callable[[str], object]
    pool: Executor | None = None


PRESETS = {
    "smoke": Preset(
        sizes={"tiny": Size(layers=2, hidden=16, vocabulary=300, steps=4, batch=2)}, seeds=2, lrs=(1e-3, 2e-3),
        recall={"hidden": 16, "width": 32, "batch_size": 8, "steps": 3, "hops": 3, "thrice": 3, "test": 32},
        rows=(16, 8), own_rows=(8, 4), epochs=1.0, healing=2, tasks=("sarcasm", "quartz"),
    ),
    "cpu": Preset(
        sizes={
            "0.3m": Size(layers=4, hidden=64, vocabulary=1024, steps=293),
            "0.3m-long": Size(layers=4, hidden=64, vocabulary=1024, steps=2003, lrs=(4e-3, 8e-3, 1.6e-2)),
            "1m": Size(layers=4, hidden=128, vocabulary=2048, steps=586),
            "3m": Size(layers=6, hidden=192, vocabulary=2048, steps=1172),
        },
        seeds=5, lrs=(2e-3, 4e-3, 8e-3), recall={"steps": 500, "hops": 2000, "thrice": 5000},
    ),
    "h200": Preset(
        sizes={
            "10m": Size(layers=6, hidden=384, vocabulary=4096, steps=1953, batch=32),
            "60m": Size(layers=12, hidden=640, vocabulary=8192, steps=3906, batch=32),
        },
        seeds=8, lrs=(5e-4, 1e-3, 2e-3), precision="bf16", recall={"steps": 500, "hops": 2000, "thrice": 5000},
    ),
}  # fmt: skip
