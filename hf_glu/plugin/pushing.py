"""Hook of ``PreTrainedModel.push_to_hub``: models with our activations go the way of ``hf-glu push``.

Who publishes stands above this room, so that it is a name here, looked up when somebody pushes.
"""

from __future__ import annotations

from functools import wraps
from importlib import import_module
from typing import Any

from hf_glu.compat.of_others import PEFT_LOADED
from hf_glu.ffn.build import owned_activations
from hf_glu.plugin.patching import Patches, require

PUBLISHER = ("hf_glu.publishing.hub.push", "push_model")


def install_push(model_class: Any, patches: Patches) -> None:
    """Have models with our activations pushed by `PUBLISHER`; stock models go the stock way."""
    plain = require(model_class, "push_to_hub")

    @wraps(plain)
    def push_to_hub(self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = bool(owned_activations(self)) or getattr(self.config, "hf_glu", None) is not None
        if not ours or PEFT_LOADED.of(self, False):  # an adapter alone is pushed as such
            return plain(self, *args, **kwargs)
        module, name = PUBLISHER
        return getattr(import_module(module), name)(self, *args, **kwargs)

    patches.set(model_class, "push_to_hub", push_to_hub)
