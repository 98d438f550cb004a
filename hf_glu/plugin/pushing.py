"""Hook of ``PreTrainedModel.push_to_hub``: models with our activations go the way of ``hf-glu push``.

That adds the code that loads them elsewhere and a card, and checks the files in a fresh process; it says so. With
``HF_GLU_PLAIN_PUSH=1`` in the environment Transformers' own method pushes, as it does outside of `hf_glu.scoped`.

Who publishes stands above this room, so that it is a name here, looked up when somebody pushes.
"""

from __future__ import annotations

import logging
import os
from functools import cache, wraps
from importlib import import_module
from typing import Any

from hf_glu.compat.of_others import PEFT_LOADED
from hf_glu.ffn.build import owned_activations
from hf_glu.plugin.patching import Patches, require

PLAIN = "HF_GLU_PLAIN_PUSH"  # environment variable: 1 has Transformers' own method push
ADDED = (
    "hf_glu adds to this push the code that loads the model without hf_glu, a model card and hf_glu_push.json, after a "
    f"fresh process has loaded it and computed the same; {PLAIN}=1 pushes as Transformers does"
)
PUBLISHER = ("hf_glu.publishing.hub.push", "push_model")


@cache
def say_once() -> None:
    """Log what is added to a push, at the first one of a process."""
    logging.getLogger("hf_glu").warning(ADDED)


def install_push(model_class: Any, patches: Patches) -> None:
    """Push models with our activations by `PUBLISHER`; stock models go the stock way."""
    plain = require(model_class, "push_to_hub")

    @wraps(plain)
    def push_to_hub(self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = bool(owned_activations(self)) or getattr(self.config, "hf_glu", None) is not None
        alone = PEFT_LOADED.of(self, False)  # an adapter alone is pushed as such
        if not ours or alone or os.environ.get(PLAIN) == "1":
            return plain(self, *args, **kwargs)
        say_once()
        module, name = PUBLISHER
        return getattr(import_module(module), name)(self, *args, **kwargs)

    patches.set(model_class, "push_to_hub", push_to_hub)
