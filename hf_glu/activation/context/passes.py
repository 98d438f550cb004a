"""What one forward pass of a stack tells the modules that read the text: kept by thread, never on a module.

Two threads may run one model at once. A plain ``threading.local`` it is: torch's compiler follows its attributes, and
replays what a graph wrote to them (not those of a subclass, nor a ``ContextVar``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_glu.activation.context.reading import Reading

_local = threading.local()


@dataclass
class Pass:
    """One forward pass of a stack.

    Attributes:
        stack: the stack.
        reading: its tokens; None: it was given none.
        cache: the cache of the layer that runs; None: there is none.
        outer: the pass within which it runs.
    """

    stack: nn.Module
    reading: Reading | None
    cache: Any = None
    outer: Pass | None = None


def current_pass() -> Pass | None:
    """Return the pass that runs in this thread, None outside of any."""
    return getattr(_local, "now", None)


def enter(stack: nn.Module, reading: Reading | None) -> None:
    """Begin a pass."""
    outer = current_pass()
    while outer is not None and outer.stack is stack:  # it was interrupted and never left
        outer = outer.outer
    _local.now = Pass(stack, reading, None, outer)


def leave(stack: nn.Module) -> None:
    """End the pass of ``stack``."""
    now = current_pass()
    if now is not None and now.stack is stack:
        _local.now = now.outer


@contextmanager
def within(now: Pass | None) -> Iterator[None]:
    """Make ``now`` this thread's pass in a block."""
    before = current_pass()
    _local.now = now
    try:
        yield
    finally:
        _local.now = before
