"""Which living models hold one config object: what a conversion writes into it would be said of all of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from torch import nn

from hf_glu.ffn.config_fields import configs_of

_built: WeakSet[nn.Module] = WeakSet()


def note(model: nn.Module) -> None:
    """Remember that a model was built of a config, as long as it lives."""
    _built.add(model)


def unshare(model: nn.Module, anchors: Iterable[nn.Module]) -> None:
    """Give a model configs of its own where an unrelated one holds them, too, as two that were built of one config.

    Models around it, and all parts of these, go on sharing one config: it says what the whole is. Of an unrelated one
    that has the very ``anchors``, whose FFNs are to be converted, a warning tells: its own config will not say it.
    """
    around = [each for each in list(_built) if any(part is model for part in each.modules())]
    related = {id(part): part for each in (*around, model) for part in each.modules()}
    own = {id(config) for part in related.values() for config in _configs(part)}
    others = [each for each in list(_built) if id(each) not in related]
    if any(id(config) in own for each in others for config in _configs(each)):
        copied: dict[int, Any] = {}
        for part in related.values():
            for key, value in list(vars(part).items()):
                if id(value) in own:
                    vars(part)[key] = copy.deepcopy(value, copied)
    converted = {id(anchor) for anchor in anchors}
    for other in others:
        if any(id(part) in converted for part in other.modules()):
            warnings.warn(
                f"{type(other).__name__} has FFNs of the {type(model).__name__} that is converted, and a config of its "
                "own, which won't say so: don't save it, or write the activation into its config",
                stacklevel=5,
            )


def _configs(part: nn.Module) -> list[Any]:
    config = vars(part).get("config")
    return list(configs_of(config)) if hasattr(config, "to_dict") else []
