"""Writing and reading a run's log and its checkpoints, from which an interrupted run is resumed exactly."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from hf_glu.checkpoint.files import BEST_WEIGHTS_FILE, CHECKPOINT_PREFIX, LOG_FILE, PROGRESS_FILE
from hf_glu.checkpoint.jsonio import JsonObject, read_object, read_text, write_json
from hf_glu.checkpoint.writing import PARTIAL, reason_of, remove, remove_partials, retire, sync, write_text, writing
from hf_glu.errors import CheckpointError, HfGluError
from hf_glu.training.loop.progress import Progress


class Resumable(Protocol):
    """A training loop, as far as a checkpoint keeps and restores it."""

    accelerator: Accelerator
    progress: Progress
    best_state: dict[str, Tensor] | None
    schedule: LambdaLR
    log: Log


STAGE = f"{PARTIAL}checkpoint"


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in a run's folder, or None; warn of those that aren't whole."""
    steps = {
        int(number): path for path in folder.glob(f"{CHECKPOINT_PREFIX}*") if (number := _number(path)).isdecimal()
    }
    for _, path in sorted(steps.items(), reverse=True):
        if is_whole(path):
            return path
        warnings.warn(f"{path} isn't whole: training goes on from an earlier one, or from the start", stacklevel=2)
    return None


def _number(path: Path) -> str:
    return path.name.removeprefix(CHECKPOINT_PREFIX)


def is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint has all files that were written, at their full lengths."""
    try:
        kept = read_object(checkpoint / PROGRESS_FILE)
    except HfGluError:
        return False
    lengths = kept.get("files", {})
    return isinstance(lengths, dict) and lengths.items() <= _lengths(checkpoint).items()


def _lengths(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != PROGRESS_FILE)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def save(loop: Resumable, folder: Path) -> None:
    """Write a checkpoint beside the older one, then remove that: an interruption leaves one of them whole.

    Raises:
        CheckpointError: it can't be written; the older one is there.
    """
    accelerator, stage = loop.accelerator, folder / STAGE
    if accelerator.is_main_process:
        remove(stage)
    accelerator.wait_for_everyone()
    try:
        with writing(folder):
            accelerator.save_state(str(stage))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                _complete(loop, stage, folder)
    finally:
        if accelerator.is_main_process:
            remove(stage)
    accelerator.wait_for_everyone()


def _complete(loop: Resumable, stage: Path, folder: Path) -> None:
    """Add best weights and progress to what Accelerate has written, and move the checkpoint to its place."""
    if loop.best_state is not None:
        save_file(loop.best_state, stage / BEST_WEIGHTS_FILE)
    loop.progress.lines = loop.log.lines
    write_json(stage / PROGRESS_FILE, {**asdict(loop.progress), "files": _lengths(stage)})
    sync(stage)
    target = folder / f"{CHECKPOINT_PREFIX}{loop.progress.step}"
    retire(target)  # one that isn't whole
    os.replace(stage, target)
    for old in folder.glob(f"{CHECKPOINT_PREFIX}*"):
        if old != target:
            retire(old)


def load(loop: Resumable, folder: Path) -> Progress:
    """Restore a loop from the newest checkpoint in ``folder``; return its progress.

    Raises:
        CheckpointError: there is none, or it doesn't fit.
    """
    found = find_checkpoint(folder)
    if found is None:
        return loop.progress
    kept = read_object(found / PROGRESS_FILE)
    kept.pop("files", None)
    try:
        progress = type(loop.progress)(**{key: value for key, value in kept.items() if value is not None})
        loop.accelerator.load_state(str(found))
        if (found / BEST_WEIGHTS_FILE).is_file():
            loop.best_state = load_file(found / BEST_WEIGHTS_FILE)
    except Exception as error:  # pickles, archives and Accelerate raise whatever they like
        raise CheckpointError(f"{found} can't be resumed: {reason_of(error)}") from error
    loop.schedule.last_epoch = progress.step
    return progress


def remove_all(folder: Path) -> None:
    """Remove a finished run's checkpoints."""
    for path in folder.glob(f"{CHECKPOINT_PREFIX}*"):
        retire(path)
    remove_partials(folder)


class Log:
    """A run's log, ``log.jsonl``: one JSON object in each line.

    Args:
        folder: None: nothing is written.
        lines: how many are kept of a log that is there: later ones a resumed run is about to write again.

    Attributes:
        lines: how many there are.
    """

    def __init__(self, folder: Path | None, lines: int = 0) -> None:
        self._path, self.lines = None if folder is None else folder / LOG_FILE, 0
        if self._path is None:
            return
        *whole, _ = (read_text(self._path) if lines and self._path.is_file() else "").split("\n")
        kept = whole[:lines]
        write_text(self._path, "".join(f"{line}\n" for line in kept))
        self.lines = len(kept)

    def write(self, values: JsonObject) -> None:
        """Add a line."""
        if self._path is not None:
            with writing(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            self.lines += 1
