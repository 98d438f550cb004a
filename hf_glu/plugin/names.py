"""Hook of ``transformers.activations``: the gated names in ``ACT2FN``."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from hf_glu.activation import registry
from hf_glu.errors import IncompatibleTransformersError
from hf_glu.plugin.patching import Patches, require


def install(module: ModuleType, patches: Patches) -> None:
    """Make ``ACT2FN`` know the registry: its entries as keys, all else (``N_glu``, later additions) on request.

    The one object that every modeling file has imported gets a subclass of its class, and its old class back at undo.
    """
    table = require(module, "ACT2FN")
    require(module, "get_activation", "activation_string")
    plain = type(table)

    def missing(self: Any, key: object) -> Any:
        if (found := registry.find(key)) is None:
            raise registry.unknown(key)
        return found.factory, {}

    def contains(self: Any, key: object) -> bool:
        return plain.__contains__(self, key) or registry.find(key) is not None

    for entry in registry:
        if entry.name in table:
            raise IncompatibleTransformersError(
                f"Transformers has an activation {entry.name!r} of its own, or something else has registered one"
            )
    for entry in registry:
        table[entry.name] = (entry.factory, {})
        patches.on_undo(lambda name=entry.name: table.pop(name, None))  # type: ignore[misc]
    namespace = {"__missing__": missing, "__contains__": contains, "__doc__": plain.__doc__}
    table.__class__ = type(plain.__name__, (plain,), namespace)
    patches.on_undo(lambda: setattr(table, "__class__", plain))
