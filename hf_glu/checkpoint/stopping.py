"""Ctrl-C and SIGTERM: the end at once where nothing is open, an exception where something has to be cleaned up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_asked: list[int] = []  # the signals that came inside of the outermost block


def exit_at_once(number: int, frame: FrameType | None) -> None:
    """End this process: as a handler of a command's start-up, where an exception might be swallowed by an import."""
    os.write(2, b"hf-glu: interrupted\n")
    os._exit(128 + number)


def end_at_once() -> None:
    """Have the signals end this process as long as nothing is open (see `cleaned_up`); ignored ones stay ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, exit_at_once)


def _raise(number: int, frame: FrameType | None = None) -> None:
    """Raise what unwinds the stack: KeyboardInterrupt, or for SIGTERM the SystemExit with a shell's exit code."""
    _asked.append(number)
    raise _exception(number)


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def check_stop() -> None:
    """Raise where a signal came inside of this block and its exception was swallowed, as Python's imports do."""
    if _asked:
        raise _exception(_asked[-1])


@contextmanager
def cleaned_up() -> Iterator[None]:
    """Have the signals raise inside of a block, so that it cleans up; handlers that somebody else has set stay.

    An exception that was swallowed is raised again at the block's end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    plain = (signal.SIG_DFL, signal.default_int_handler, exit_at_once)
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) in plain}
    for number in before:
        signal.signal(number, _raise)
    try:
        yield
        check_stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if before:
            _asked.clear()
