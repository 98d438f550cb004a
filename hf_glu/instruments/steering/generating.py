"""Knowing, while a model generates, which tokens were its prompt: ``generate`` is told, the model's forward isn't."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import Tensor

NAME = "generate"
PROMPTS = ("inputs", "input_ids", "inputs_embeds")  # the first that is given
_local = threading.local()
_installing = threading.Lock()


def prompt() -> tuple[int, int] | None:
    """Return how many texts, and tokens of each, the running ``generate`` of this thread was given; None outside."""
    found: tuple[int, int] | None = getattr(_local, "prompt", None)
    return found


@contextmanager
def noting_prompt(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Note the prompt among the arguments of ``generate``, by name, for as long as it runs in this thread."""
    given = (arguments.get(name) for name in PROMPTS)
    before = prompt()
    first = next((each for each in given if isinstance(each, Tensor) and each.ndim > 1), None)
    _local.prompt = None if first is None else (first.shape[0], first.shape[1])
    try:
        yield
    finally:
        _local.prompt = before


class Generating:
    """What takes the place of a model's ``generate`` for as long as somebody asks; it does the same.

    Attributes:
        plain: what it takes the place of.
        own: that, where the model has one that isn't its class's.
        askers: how many ask.
    """

    def __init__(self, model: Any) -> None:
        self.plain, self.own, self.askers = getattr(model, NAME), vars(model).get(NAME), 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        with noting_prompt({"inputs": args[0], **kwargs} if args else kwargs):
            return self.plain(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return what a copy of the model generates by: nobody asks there."""
        return deepcopy(self.plain, memo)


def ask(model: Any) -> None:
    """Make the ``generate`` of ``model`` note its prompts; a model that has none is left alone."""
    if not hasattr(type(model), NAME):
        return
    with _installing:
        if not isinstance(vars(model).get(NAME), Generating):
            vars(model)[NAME] = Generating(model)
        vars(model)[NAME].askers += 1


def stop_asking(model: Any) -> None:
    """Undo one `ask`."""
    with _installing:
        own = vars(model).get(NAME)
        if isinstance(own, Generating):
            own.askers -= 1
            if own.askers:
                return
            del vars(model)[NAME]
            if own.own is not None:
                vars(model)[NAME] = own.own
