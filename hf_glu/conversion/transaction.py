"""A conversion changes a model wholly or not at all.

What a model is made of is remembered before a conversion, and put back where that raises, whatever and wherever it
raises (Ctrl-C, too). Weights are remembered, not copied: a conversion gives modules new parameters, and writes into
none that was there before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_glu.errors import ConversionError

P = ParamSpec("P")
R = TypeVar("R")


def whole(verb: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Make ``verb``, whose first argument is a model, leave the model as it was where it raises.

    What it makes are ordinary tensors, in inference mode, too; parameters that modules share stay shared, or it raises.
    """

    @wraps(verb)
    def run(model: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        before = Snapshot(model)
        try:
            with torch.inference_mode(False):
                result = verb(model, *args, **kwargs)
            _check_ties(model, before.ties)
        except BaseException:
            before.restore()
            raise
        return result

    return run


class Snapshot:
    """What a model is made of: its modules' classes and attributes (parameters, buffers, hooks), and its configs'.

    Everything is put back into the objects that were there: the handles of hooks and whoever holds a module or a
    config see what they saw.

    Attributes:
        ties: what several modules share.
    """

    def __init__(self, model: Any) -> None:
        parts = list(_parts(model))
        self.ties = ties(model)
        self._classes = [(part, type(part)) for part in parts if isinstance(part, nn.Module)]
        self._contents = [(part, part.copy()) for part in parts if isinstance(part, (dict, list, set))]

    def restore(self) -> None:
        """Put everything back."""
        for item, kind in self._classes:
            if type(item) is not kind:
                item.__class__ = kind
        for container, content in self._contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


def _parts(model: Any) -> Iterator[Any]:
    """Yield the modules of a model, its configs, and every container in their attributes, once each."""
    seen: dict[int, Any] = {}
    waiting = [model]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        if isinstance(part, (nn.Module, PreTrainedConfig)):
            waiting.append(vars(part))
        elif isinstance(part, dict):
            waiting.extend(part.values())
        elif isinstance(part, (list, tuple, set)):
            waiting.extend(part)
        else:
            continue
        yield part


def ties(model: Any) -> dict[Tensor, tuple[str, ...]]:
    """Return the parameters that several modules have, with the names that they have there."""
    found: dict[Tensor, list[str]] = {}
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        for key, parameter in module.named_parameters(recurse=False):
            found.setdefault(parameter, []).append(f"{name}.{key}".removeprefix("."))
    return {parameter: tuple(names) for parameter, names in found.items() if len(names) > 1}


def _check_ties(model: Any, before: dict[Tensor, tuple[str, ...]]) -> None:
    """Raise ConversionError where parameters that were shared aren't any more."""
    after = ties(model)
    for parameter, names in before.items():
        if after.get(parameter) != names:
            raise ConversionError(
                f"{names[0]} and {names[1]} are one parameter, which a conversion would make two: let the layers share "
                "the module, or give each a copy of its own"
            )
