"""Stopping at Ctrl-C between two steps, never in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hf_glu.errors import TrainingError


class Interrupted(TrainingError):
    """An interruption by Ctrl-C, after ``step`` steps."""

    exit_code = 130

    def __init__(self, step: int, folder: Path | None) -> None:
        kept = "" if folder is None else f": {folder} has a checkpoint, --resume goes on from it"
        super().__init__(f"interrupted after step {step}{kept}")
        self.step = step


class Flag:
    """A flag that is true once Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.on = False

    def __bool__(self) -> bool:
        return self.on


@contextmanager
def interruptible() -> Iterator[Flag]:
    """Yield a flag that the first Ctrl-C (or SIGTERM) sets; the second one interrupts at once."""
    flag = Flag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        flag.on = True
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
