"""A run's log and its checkpoints: Accelerate's state (weights, optimizer, random states) and the loop's progress."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from hf_glu.errors import CheckpointError
from hf_glu.jsonio import write_json

if TYPE_CHECKING:
    from hf_glu.training.loop import Loop, Progress

PREFIX, PARTIAL = "checkpoint-", ".checkpoint.partial"
PROGRESS, BEST, LOG = "progress.json", "best.safetensors", "log.jsonl"


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a run's folder, or None."""
    found = [path for path in folder.glob(f"{PREFIX}*") if (path / PROGRESS).is_file()]
    return max(found, key=lambda path: int(path.name.removeprefix(PREFIX)), default=None)


def save(loop: Loop, folder: Path) -> None:
    """Write a checkpoint beside the older one, then remove that: an interruption leaves one of them whole."""
    accelerator, partial = loop.accelerator, folder / PARTIAL
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if loop.best_state is not None:
            save_file(loop.best_state, partial / BEST)
        write_json(partial / PROGRESS, asdict(loop.progress))
        target = folder / f"{PREFIX}{loop.progress.step}"
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in folder.glob(f"{PREFIX}*"):
            if old != target:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load(loop: Loop, folder: Path) -> Progress:
    """Put a loop where the newest checkpoint in ``folder`` left it.

    Raises:
        CheckpointError: there is none, or it doesn't fit.
    """
    found = find_checkpoint(folder)
    if found is None:
        return loop.progress
    try:
        loop.accelerator.load_state(str(found))
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{found} can't be resumed: {str(error).splitlines()[0]}") from error
    kept = json.loads((found / PROGRESS).read_text(encoding="utf-8"))
    progress = type(loop.progress)(**{key: value for key, value in kept.items() if value is not None})
    if (found / BEST).is_file():
        loop.best_state = load_file(found / BEST)
    loop.schedule.last_epoch = progress.step
    return progress


def remove_all(folder: Path) -> None:
    """Remove a finished run's checkpoints."""
    for path in [*folder.glob(f"{PREFIX}*"), folder / PARTIAL]:
        shutil.rmtree(path, ignore_errors=True)


class Log:
    """``log.jsonl``, one JSON object a line.

    Args:
        folder: None: nothing is written.
        step: lines of later steps, which a resumed run is about to do again, are dropped.
    """

    def __init__(self, folder: Path | None, step: int = 0) -> None:
        self._path = None if folder is None else folder / LOG
        if self._path is None:
            return
        lines = self._path.read_text(encoding="utf-8").splitlines() if step and self._path.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Add a line."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
