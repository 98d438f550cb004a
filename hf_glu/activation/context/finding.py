"""Finding the same modules of a model again and again: each pass asks, and a walk takes longer than what they do.

A module keeps the paths of what was found below it, which a copy or a pickle of it may keep, too. A path that doesn't
lead to what is looked for any more (PEFT wraps what it trains) has everything looked for anew; whoever adds modules has
the paths forgotten.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hf_glu.compat.of_torch import CHILDREN

Wanted = Callable[[nn.Module], bool]
PATHS = "_hf_glu_paths"


def find(module: nn.Module, wanted: Wanted) -> list[nn.Module]:
    """Return the modules below ``module``, or itself, of which ``wanted``, a function of some module, says so."""
    if torch.compiler.is_compiling():
        return [part for part in module.modules() if wanted(part)]
    known: dict[str, tuple[tuple[str, ...], ...]] = module.__dict__.setdefault(PATHS, {})
    found = _follow(module, known.get(wanted.__qualname__), wanted)
    if found is None:
        names = {name: part for name, part in module.named_modules() if wanted(part)}
        known[wanted.__qualname__] = tuple(tuple(name.split(".")) if name else () for name in names)
        found = list(names.values())
    return found


def forget(model: nn.Module) -> None:
    """Forget the paths below ``model``, so that everything is looked for anew."""
    for module in model.modules():
        module.__dict__.pop(PATHS, None)


def _follow(module: nn.Module, paths: tuple[tuple[str, ...], ...] | None, wanted: Wanted) -> list[nn.Module] | None:
    if paths is None:
        return None
    found = []
    for path in paths:
        part: nn.Module | None = module
        for name in path:
            part = None if part is None else CHILDREN.of(part).get(name)
        if part is None or not wanted(part):
            return None
        found.append(part)
    return found
