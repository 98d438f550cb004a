"""Hook of ``lm_eval.models``: ``--model hf-glu``, where lm-eval doesn't read it from our entry point by itself."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from hf_glu.plugin.patching import Patches

NAME = "hf-glu"
TARGET = "hf_glu.plugin.lm_eval:GatedLM"


def install(module: ModuleType, patches: Patches) -> None:
    """Register the model in lm-eval by its place, which is imported when it is asked for."""
    from lm_eval.api import registry

    known: Any = getattr(registry, "model_registry", None)
    if known is not None and hasattr(known, "register") and NAME not in known:  # older ones have no lazy names
        known.register(NAME, target=TARGET)
