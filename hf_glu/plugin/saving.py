"""Hook of ``PreTrainedModel.save_pretrained``: a model of ours isn't saved with a config that says another one."""

from __future__ import annotations

from functools import wraps
from importlib import import_module
from typing import Any

from hf_glu.ffn.build import is_ours
from hf_glu.ffn.config_fields import names_ours
from hf_glu.plugin.patching import Patches, require


def install_saving(model_class: Any, patches: Patches) -> None:
    """Check models with a gate of ours before they are saved; stock models are saved as ever."""
    plain = require(model_class, "save_pretrained")

    @wraps(plain)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_ours(self) or names_ours(self.config):
            import_module("hf_glu.conversion.foresight").check_saved(self)  # not above: it needs all of Transformers
        return plain(self, *args, **kwargs)

    patches.set(model_class, "save_pretrained", save_pretrained)
