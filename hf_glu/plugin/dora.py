"""Hook of ``peft.tuners.lora.dora``: DoRA divides by the norm of each row, and rows that a conversion adds may be 0."""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

from hf_glu.compat.of_others import DORA
from hf_glu.errors import OptionError
from hf_glu.plugin.patching import Patches


def install(module: ModuleType, patches: Patches) -> None:
    """Make DoRA refuse a linear layer of which it would make NaN."""
    layer = DORA.of(module, None)
    plain = getattr(layer, "update_layer", None)
    if plain is None:
        return

    @wraps(plain)
    def update_layer(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if type(self) is layer and self.weight.device.type != "meta" and not self.weight.all():
            raise OptionError(
                "DoRA divides by the norm of each row, and some rows are 0 (the up rows of an exact conversion): "
                "its loss would be NaN from the start; use LoRA without DoRA, or leave in-projections out"
            )

    patches.set(layer, "update_layer", update_layer)
