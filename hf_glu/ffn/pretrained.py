"""What a Transformers model with our activations does beyond its stock class: for the plugin, and without it."""

from __future__ import annotations

from torch import nn

from hf_glu.activation import OwnedModule


def initialize(module: nn.Module) -> bool:
    """Initialise a module of ours, unless that has been done; return whether it was done now.

    What a checkpoint has loaded stays: ``transformers.initialization`` leaves it alone.
    """
    if not isinstance(module, OwnedModule) or getattr(module, "_is_hf_initialized", False):
        return False
    module.reset_parameters()
    module._is_hf_initialized = True  # type: ignore[assignment]
    return True
