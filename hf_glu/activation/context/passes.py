"""What one forward pass of a stack tells the modules that read the text: kept by thread, never on a module.

Two threads may run one model at once. A plain ``threading.local`` it is: torch's compiler follows its attributes, and
replays what a graph wrote to them (not those of a subclass, nor a ``ContextVar``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_glu.activation.context.reading import Reading

_local = threading.local()


class Held:
    """Base of what whoever changes a model for a while keeps of a pass that runs meanwhile."""

    @property
    def ended(self) -> bool:
        """Whether the change has been undone, so that no layer of the pass can be computed again as it was."""
        raise NotImplementedError


@dataclass
class Pass:
    """One forward pass of a stack.

    Attributes:
        stack: the stack.
        reading: its tokens; None: it was given none.
        cache: the cache of the layer that runs; None: there is none.
        outer: the pass within which it runs.
        balance: the coefficient of its routers' own balance losses; None: each has its own.
        held: what others keep of it, by whom.
        told: a block that has been told of the pass before it was called.
        pads: whether the stack may add padding to the end of the texts that it is given.
    """

    stack: nn.Module
    reading: Reading | None
    cache: Any = None
    outer: Pass | None = None
    balance: float | None = None
    held: dict[Any, Held] = field(default_factory=dict)
    told: nn.Module | None = None
    pads: bool = False


@dataclass
class Asking:
    """Whether a forward pass of a model with experts is to return its routers' logits.

    Attributes:
        model: the model.
        wanted: whether; None: it is up to the models inside.
        coefficient: of the balance loss, as the outermost config says it; None: none does.
        graded: whether the pass has gradients.
        layers: what the layers have told.
        added: the balance loss that has been added to a loss inside.
        outer: that of the model around.
    """

    model: nn.Module
    wanted: bool | None
    coefficient: float | None
    graded: bool
    layers: list[Any] = field(default_factory=list)
    added: Tensor | None = None
    outer: Asking | None = None


def current_pass() -> Pass | None:
    """Return the pass that runs in this thread, None outside of any."""
    return getattr(_local, "now", None)


def enter(stack: nn.Module, reading: Reading | None, *, pads: bool = False) -> None:
    """Begin a pass."""
    outer = current_pass()
    held: dict[Any, Held] = {}
    if outer is not None and outer.stack is stack:  # others have begun this pass, too
        held = {owner: each for owner, each in outer.held.items() if not each.ended}
    while outer is not None and outer.stack is stack:  # it was interrupted and never left
        outer = outer.outer
    _local.now = Pass(stack, reading, None, outer, _balance(asking()), held, pads=pads)


def asking() -> Asking | None:
    """Return what the innermost model with experts that runs in this thread is asked for."""
    return getattr(_local, "asking", None)


def begin_asking(now: Asking) -> None:
    """Begin a pass of a model with experts."""
    outer = asking()
    while outer is not None and outer.model is now.model:  # it was interrupted and never left
        outer = outer.outer
    now.outer = outer
    _local.asking = now
    running = current_pass()
    if running is not None and running.stack is now.model:  # which of the two begins first depends on the hooks
        running.balance = _balance(now)


def end_asking(model: nn.Module) -> Asking | None:
    """End the pass of ``model`` and return it; None: it has none."""
    now = asking()
    while now is not None and now.model is not model:
        now = now.outer
    if now is not None:
        _local.asking = now.outer
    return now


def _balance(now: Asking | None) -> float | None:
    """Return the coefficient of each router's own balance loss: 0 where one loss over all their logits is asked for."""
    if now is None:
        return None
    return 0.0 if now.wanted else now.coefficient


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
