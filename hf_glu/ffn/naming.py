"""The name by which others load a model's base: an adapter (PEFT), a frozen reference (TRL)."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_glu.compat.of_models import NAME_OR_PATH


def unname(model: Any) -> None:
    """Take the name of the checkpoint that it was loaded from off a model that is another now, and off its configs."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if "name_or_path" in vars(module):
            vars(module)["name_or_path"] = ""
        config = vars(module).get("config")
        for part in (config, *vars(config).values()) if hasattr(config, "to_dict") else ():
            if NAME_OR_PATH.name in getattr(part, "__dict__", {}):
                NAME_OR_PATH.put(part, "")
