"""Hook of ``peft.tuners.tuners_utils``: experts that PEFT has trained become plain modules again, whole.

PEFT adapts a bank's 3-D weights by wrapping the bank, and trains a copy of an activation inside of it; its own merging
takes the wrapper away and then doesn't find the copies, which stay, under names that no checkpoint has.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

from hf_glu.compat.of_others import TRAINED_COPY, UNLOAD
from hf_glu.plugin.patching import Patches


def install(module: ModuleType, patches: Patches) -> None:
    """Let what PEFT unloads or merges keep no wrapper of its own inside of a bank."""
    tuner = getattr(module, "BaseTuner", None)
    plain = UNLOAD.of(tuner, None)
    if plain is None:  # a PEFT that does it in another way
        return

    @wraps(plain)
    def unload(self: Any, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        model = plain(self, merge, *args, **kwargs)
        for name, wrapper in list(model.named_modules()):
            if isinstance(wrapper, TRAINED_COPY.find()):
                owner, _, attribute = name.rpartition(".")
                trained = wrapper.unload_and_optionally_merge_module(merge=merge, safe_merge=False, adapter_names=None)
                setattr(model.get_submodule(owner), attribute, trained if merge else wrapper.original_module)
        return model

    patches.set(tuner, UNLOAD.name, unload)
