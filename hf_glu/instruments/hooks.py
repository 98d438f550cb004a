"""Hooks that are put on a running model and taken off again: seen by torch's compiler, in order, and in no copy.

Every hook of the instruments is a `Hook`. Those that only look at a module's calls are run after all that change what
it is given or gives, whichever came first, so that they see what the model computes with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_glu.compat.of_torch import FORWARD_HOOKS, FORWARD_PRE_HOOKS
from hf_glu.inplace import InPlace, become, become_stock

NAME = "hf_glu_hooks"
_marking = threading.Lock()


class Handle(Protocol):
    """What takes a hook out again."""

    def remove(self) -> None:
        """Take it out."""


class Marked(InPlace):
    """The class of a module while hooks of ours are on it: by number, whether each only looks.

    torch's compiler looks at a module's class before it runs what it has compiled, and not whether hooks have come.
    """

    hf_glu_hooks: dict[int, bool]

    def __reduce__(self) -> Any:
        """Pickle or copy the module as it is without our hooks, which nobody could take out of a copy."""
        ours, plain = self.hf_glu_hooks, object.__new__(type(self))
        for name, value in vars(self).items():
            hooks = isinstance(value, dict) and any(key in ours for key in value)
            kept = {key: each for key, each in value.items() if key not in ours} if hooks else None
            vars(plain)[name] = value if kept is None else type(value)(kept)
        become_stock(plain, Marked)
        reduced: Any = plain.__reduce_ex__(2)
        make, given, *state = reduced
        return _made, (make, given), *state  # pickle knows copyreg's own, and wants them to be of this class


def _made(make: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    return make(*given)


class Hook:
    """A hook on a module, which marks the module: what `hook_before` and `hook_after` make."""

    def __init__(self, module: nn.Module, handle: RemovableHandle, *, looks: bool) -> None:
        self.module, self.handle = module, handle
        with _marking:
            become(module, Marked)
            ours = vars(module).setdefault(NAME, {})
            ours[handle.id] = looks
            for hooks in (FORWARD_PRE_HOOKS.of(module), FORWARD_HOOKS.of(module)):
                for number in [number for number in hooks if ours.get(number)]:
                    hooks.move_to_end(number)

    def remove(self) -> None:
        """Take the hook out; the last one takes the mark with it. Does nothing the second time."""
        self.handle.remove()
        with _marking:
            ours = vars(self.module).get(NAME, {})
            ours.pop(self.handle.id, None)
            if not ours:
                become_stock(self.module, Marked)


def hook_before(module: nn.Module, hook: Callable[..., Any], *, looks: bool = False, **more: Any) -> Hook:
    """Put a hook on a module that is called before it.

    Args:
        module: the module.
        hook: a forward pre-hook.
        looks: whether it changes nothing: it is run after those that do, and no compiler traces it.
        more: options of torch's.
    """
    return Hook(module, module.register_forward_pre_hook(_plain(hook, looks), **more), looks=looks)


def hook_after(module: nn.Module, hook: Callable[..., Any], *, looks: bool = False, **more: Any) -> Hook:
    """Put a forward hook on a module, which is called after it; arguments are those of `hook_before`."""
    return Hook(module, module.register_forward_hook(_plain(hook, looks), **more), looks=looks)


def _plain(hook: Callable[..., Any], looks: bool) -> Callable[..., Any]:
    # what looks is plain Python, of which a compiler would make many small graphs
    return torch.compiler.disable(hook) if looks else hook
