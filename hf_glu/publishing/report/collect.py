"""Reading a run's folder into plain data, as far as it has been written.

A run of one task is ``run.json``, ``log.jsonl`` and, once it is finished, ``results.json``. A suite is ``suite.json``
with such a folder for each task, a comparison ``compare.json`` with one for each variant and seed.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from hf_glu.checkpoint.carrying import without_paths
from hf_glu.checkpoint.files import COMPARISON_FILE, LOG_FILE, RESULTS_FILE, RUN_FILE, SUITE_FILE
from hf_glu.checkpoint.jsonio import read_lines, read_object
from hf_glu.checkpoint.writing import user_path
from hf_glu.errors import CheckpointError, DataError
from hf_glu.publishing.training import is_language, material

Data: TypeAlias = dict[str, object]  # of a file that anybody may have written: looked at by the functions below

RUN, SUITE, COMPARISON = "run", "suite", "comparison"
_INDEX = {SUITE: SUITE_FILE, COMPARISON: COMPARISON_FILE}
_OF_RUN = (RUN_FILE, LOG_FILE, RESULTS_FILE)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of one task or text, as far as it was written.

    The score of a language model is its loss, negative: here it is the loss again.

    Attributes:
        name: of its folder.
        about: ``run.json``.
        steps: the log's lines on training.
        evaluations: the log's lines on evaluation.
        results: ``results.json``; None: it isn't finished.
    """

    name: str
    about: Data
    steps: list[Data]
    evaluations: list[Data]
    results: Data | None

    @property
    def state(self) -> str:
        """``finished``, ``unfinished``, or ``missing`` where nothing has been written."""
        if self.results is not None:
            return "finished"
        return "unfinished" if self.about or self.steps or self.evaluations else "missing"

    @property
    def task(self) -> str:
        """The task's name."""
        return str((self.results or {}).get("task") or self.about.get("task") or self.name)

    @property
    def options(self) -> Data:
        """The options."""
        return mapping(self.about.get("options"))

    @property
    def language(self) -> bool:
        """Whether a language model was trained."""
        return is_language(self.options)

    @property
    def material(self) -> str:
        """The name of what was trained on: the task, or the text."""
        return material(self.task, self.options)

    @property
    def outcome(self) -> Data:
        """The results, empty as long as there are none."""
        return self.results or {}

    @property
    def training(self) -> Data:
        """What the results say of training."""
        return mapping(self.outcome.get("training"))

    @property
    def main(self) -> list[str]:
        """Names of the metrics whose mean is the score."""
        names = self.outcome.get("main", ["loss"] if self.language else None)
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def activations(self) -> list[Data]:
        """The activations' statistics."""
        return items(self.outcome.get("activations"))

    @property
    def adaptive(self) -> list[Data]:
        """What activations with parameters have become, a row for each."""
        return items(self.outcome.get("adaptive"))

    @property
    def experts(self) -> list[Data]:
        """The experts' loads, a row for each layer that has experts."""
        return items(self.outcome.get("experts"))


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The content of a folder: a run, a suite or a comparison.

    Attributes:
        kind: ``run``, ``suite`` or ``comparison``.
        index: ``suite.json`` or ``compare.json``.
        runs: by name; one where it is a run.
    """

    kind: str
    index: Data
    runs: dict[str, Run]


def collect(folder: str | os.PathLike[str]) -> Collected:
    """Read a folder; paths of this machine are cut to names, since reports are shown to others.

    Raises:
        CheckpointError: there is no such folder, or a file in it can't be read.
        DataError: nothing in it is a run's, or a file isn't what it should be; the message names file and line.
    """
    path = user_path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{folder} is no folder: give the folder that a run, suite or comparison was written to")
    for kind, name in _INDEX.items():
        if (path / name).is_file():
            index = without_paths(read_object(path / name))
            return Collected(kind=kind, index=index, runs=_runs_below(path, index))
    if _is_run(path):
        return Collected(kind=RUN, index={}, runs={path.absolute().name: _read_run(path)})
    if runs := _runs_below(path, {}):  # its index isn't written yet
        return Collected(kind=SUITE, index={"suite": path.absolute().name, "partial": True}, runs=runs)
    raise DataError(f"nothing to report in {folder}: it has none of {', '.join([*_OF_RUN, *_INDEX.values()])}")


def number(value: object) -> float | None:
    """Return a finite number as it is, anything else as None."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return value


def mapping(value: object) -> Data:
    """Return a mapping as it is, anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def numbers(value: object) -> list[float]:
    """Return the finite numbers in a list, none where it is no list."""
    return [item for item in value if number(item) is not None] if isinstance(value, list) else []


def items(value: object) -> list[Data]:
    """Return the mappings in a list, none where it is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _OF_RUN)


def _read_run(folder: Path, results: Data | None = None) -> Run:
    entry, log, final = (folder / name for name in _OF_RUN)
    about = without_paths(read_object(entry)) if entry.is_file() else {}
    lines = without_paths(read_lines(log)) if log.is_file() else []
    evaluations = [line for line in lines if "evaluation" in line or "score" in line]
    results = without_paths(read_object(final)) if final.is_file() else results
    if is_language(mapping(about.get("options"))):
        evaluations, results = [_with_loss(line) for line in evaluations], _with_loss(results) if results else results
    return Run(
        name=folder.absolute().name,
        about=about,
        steps=[line for line in lines if number(line.get("loss")) is not None],
        evaluations=evaluations,
        results=results,
    )


def _with_loss(data: Data) -> Data:
    """Return the data of a language model with the loss in the place of the score."""
    score = number(data.get("score"))
    return data if score is None else {**data, "score": -score}


def _runs_below(folder: Path, index: Data) -> dict[str, Run]:
    """Return the runs in the subfolders and those that only the index knows, in the index's order."""
    tasks = mapping(index.get("tasks"))
    missing = missing if isinstance(missing := index.get("missing"), list) else []
    below = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and _is_run(path)}
    runs = {}
    for name in dict.fromkeys([*tasks, *map(str, missing), *below]):
        results = mapping(tasks.get(name)) or None
        empty = Run(name=name, about={}, steps=[], evaluations=[], results=results)
        runs[name] = _read_run(below[name], results) if name in below else empty
    return runs
