"""What memory in the gate brings where something must be recalled: a flag beyond attention's reach, and two hops."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hf_glu.checkpoint.files import COMPARISON_FILE
from hf_glu.checkpoint.jsonio import read_object, to_json, write_json
from hf_glu.errors import CheckpointError
from hf_glu.training.record import MADE_OF, difference, versions
from hf_glu.training.results import Record
from recipes.evidence.presets import TUNED, Preset, Setting

sys.path.append(str(Path(__file__).parents[1]))  # the recipes import each other by their own names

import memory
from small_training import train

LRS = (3e-3, 1e-2, 3e-2)
CHAINS, SYMBOLS = 3, 32  # chains a -> b -> c, and tokens, the first of which asks
Batch = dict[str, Tensor]
Make = Callable[[int, int], Batch]  # so many sequences, of a seed
Run = tuple[str, str, float, int]  # task, activation, learning rate, seed


@dataclass(frozen=True)
class Recall:
    """A recall task.

    Attributes:
        make: makes its sequences.
        sizes: changes to those of `memory.SIZES`.
        steps: the entry of a preset's ``recall`` that says how many.
        lrs: learning rates to choose from.
    """

    make: Make
    sizes: dict[str, Any]
    steps: str = "steps"
    lrs: tuple[float, ...] = LRS


def _flag(distance: int) -> Recall:
    return Recall(lambda count, seed: memory.make_batch(count, distance, seed), {})


def two_hops(count: int, seed: int, *, symbols: int = SYMBOLS, questions: int = 1) -> Batch:
    """Return ``count`` sequences: pairs in any order, then a query, an ``a`` and its ``c`` for each question.

    Each chain is two pairs, ``a b`` and ``b c``, of symbols that no other chain has; the labels are each ``c`` alone.

    Args:
        count: how many; each is ``[4 * CHAINS + 3 * questions]``.
        seed: of the sequences.
        symbols: how many there are, the query among them.
        questions: of how many of the chains, of each once.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = 1 + torch.rand(count, symbols - 1, generator=generator).argsort(-1)[:, : 3 * CHAINS]
    a, b, c = chosen.view(count, 3, CHAINS).unbind(1)
    pairs = torch.cat([torch.stack([a, b], -1), torch.stack([b, c], -1)], 1)  # [count, 2 CHAINS, 2]
    order = torch.rand(count, 2 * CHAINS, generator=generator).argsort(-1)
    pairs = pairs.gather(1, order.unsqueeze(-1).expand_as(pairs)).flatten(1)
    if questions == 1:  # drawn as the results of d3 to d5 were
        asked = torch.randint(CHAINS, (count, 1), generator=generator)
    else:
        asked = torch.rand(count, CHAINS, generator=generator).argsort(-1)[:, :questions]
    asking = torch.stack([torch.zeros_like(asked), a.gather(1, asked), c.gather(1, asked)], -1).flatten(1)
    ids = torch.cat([pairs, asking], 1)
    labels = torch.full_like(ids, memory.IGNORED)
    answers = slice(pairs.shape[1] + 2, None, 3)
    labels[:, answers] = ids[:, answers]
    return {"input_ids": ids, "labels": labels}


TASKS = {
    "flag 16": _flag(16),
    "flag 32": _flag(32),
    "two hops": Recall(two_hops, {"window": None, "vocabulary": SYMBOLS}, "hops"),
    "two hops, asked thrice": Recall(
        partial(two_hops, symbols=16, questions=CHAINS),
        {"window": None, "vocabulary": 16, "layers": 3, "hidden": 64, "width": 128}, "thrice", (1e-3, 3e-3, 1e-2),
    ),
}  # fmt: skip
# study -> its tasks
STUDIES = {"memory-recall": ("flag 16", "flag 32", "two hops"), "memory-hops": ("two hops, asked thrice",)}


def sizes_of(task: Recall, preset: Preset) -> dict[str, Any]:
    """Return the sizes of a task's models, their training and their test."""
    more = {key: value for key, value in preset.recall.items() if key in memory.SIZES}
    return memory.SIZES | more | task.sizes | {"steps": preset.recall[task.steps]}


def run_once(name: str, activation: str, lr: float, seed: int, preset: Preset) -> dict[str, float]:
    """Train and test one model on a task; an odd seed makes the test, even ones the steps, whatever the model."""
    task = TASKS[name]
    sizes = SimpleNamespace(**sizes_of(task, preset))
    model, start, first = memory.make_model(activation, sizes, seed), time.perf_counter(), 2 * seed * 10**6
    batch = lambda step: task.make(sizes.batch_size, first + 2 * step)  # noqa: E731
    train(model, batch, sizes.steps, lr=lr, factor=sizes.factor, title=f"{activation}, seed {seed}")
    accuracy = memory.accuracy(model, task.make(sizes.test, first + 1))
    return {"score": accuracy, "parameters": model.num_parameters(), "seconds": time.perf_counter() - start}


class Runs:
    """Runs whose results are kept in one small file each, so that none is run twice.

    Args:
        setting: of all of them.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.begun = setting, dict[Path, Future[dict[str, float]]]()
        setting.output.mkdir(parents=True, exist_ok=True)

    def plan(self, runs: Iterable[Run]) -> None:
        """Let a pool begin with the runs that aren't finished, in their order."""
        if self.setting.pool:
            unknown = {self._path(run): run for run in runs if self._known(run) is None}
            self.begun |= {path: self.setting.pool.submit(run_once, *run, self.setting.preset)
                           for path, run in unknown.items()}  # fmt: skip

    def result(self, *run: *Run) -> dict[str, float]:
        """Return the result of a run (task, activation, learning rate, seed), from its file or from training.

        Raises:
            CheckpointError: the file is of other sizes or versions.
        """
        if (known := self._known(run)) is not None:
            return known
        name, activation, lr, seed = run
        self.setting.tell(f"{name}: {activation}, lr {lr:g}, seed {seed}")
        path = self._path(run)
        begun = self.begun.get(path)
        result = begun.result() if begun else run_once(*run, self.setting.preset)
        write_json(path, {**result, MADE_OF: self._made_of(name)})
        return result

    def _path(self, run: Run) -> Path:
        name, activation, lr, seed = run
        named = name.replace(",", "").replace(" ", "-")
        return self.setting.output / f"{named}-{activation}-lr{lr:g}-seed{seed}.json"

    def _made_of(self, name: str) -> Record:
        options = json.loads(to_json(sizes_of(TASKS[name], self.setting.preset)))
        return {"options": options, "data": {}, "model": {}, "versions": versions()}

    def _known(self, run: Run) -> dict[str, float] | None:
        path = self._path(run)
        if not path.is_file():
            return None
        known = read_object(path)
        if found := difference(known.get(MADE_OF), self._made_of(run[0]), frozenset()):
            raise CheckpointError(f"{path} is a run with {found}: choose another output, or remove it")
        return {key: value for key, value in known.items() if key != MADE_OF}


def run_recall(study: str, setting: Setting) -> dict[str, Any]:
    """Train every activation on every task, each with its best learning rate; return rows as a comparison has them.

    The table's seeds are those that all tasks are finished with.
    """
    runs, seeds = Runs(setting), range(setting.preset.seeds)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in STUDIES[study]}
    table: dict[str, Any] = {}
    for name in rows:
        lrs = TASKS[name].lrs
        runs.plan((name, act, lr, TUNED) for act in memory.ACTIVATIONS for lr in lrs)
        rates = {act: {lr: runs.result(name, act, lr, TUNED)["score"] for lr in lrs} for act in memory.ACTIVATIONS}
        best = {act: max(tried, key=lambda lr: tried[lr]) for act, tried in rates.items()}
        found: dict[str, list[dict[str, float]]] = {act: [] for act in rates}
        runs.plan((name, act, best[act], seed) for seed in seeds for act in found)
        for seed in seeds:
            for act, each in found.items():
                each.append(runs.result(name, act, best[act], seed))
            rows[name] = [_row(f"{name}: {act}", each, best[act], rates[act]) for act, each in found.items()]
            finished = min(len(some[0]["scores"]) if some else 0 for some in rows.values())
            table = {"metric": "accuracy", "seeds": list(range(finished)), "lr_seed": TUNED,
                     "variants": [row for some in rows.values() for row in some]}  # fmt: skip
            write_json(setting.output / COMPARISON_FILE, table)
    return table


def _row(name: str, results: list[dict[str, float]], lr: float, rates: dict[float, float]) -> dict[str, Any]:
    scores = [each["score"] for each in results]
    return {
        "name": name, "scores": scores, "mean": fmean(scores), "lr": lr,
        "rates": {f"{tried:g}": score for tried, score in rates.items()},
        "parameters": results[0]["parameters"], "seconds": fmean(each["seconds"] for each in results),
    }  # fmt: skip
