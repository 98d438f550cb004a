"""Ctrl-C and SIGTERM: they end the process at once, or raise inside of blocks that have to clean up."""

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
    """End this process without an exception, which an import might swallow: a signal handler."""
    os.write(2, b"hf-glu: interrupted\n")
    os._exit(128 + number)


def end_at_once() -> None:
    """Let the signals end this process at once, outside of `cleaned_up` blocks; ignored ones stay ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, exit_at_once)


def _raise(number: int, frame: FrameType | None = None) -> None:
    """Raise KeyboardInterrupt, or for SIGTERM a SystemExit with the exit code of a shell: a signal handler."""
    _asked.append(number)
    raise _exception(number)


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def check_stop() -> None:
    """Raise again if a signal came inside of the `cleaned_up` block and something, such as an import, swallowed it."""
    if _asked:
        raise _exception(_asked[-1])


@contextmanager
def cleaned_up() -> Iterator[None]:
    """Let the signals raise inside of the block, so that it cleans up; handlers that somebody else has set stay.

    A stop that was swallowed, or that a library has made an error of its own of, is raised again at the block's end.
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
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt | SystemExit):
            check_stop()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if before:
            _asked.clear()
