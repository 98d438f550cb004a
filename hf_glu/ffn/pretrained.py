"""What a Transformers model with our activations does beyond its stock class: for the plugin, and without it."""

from __future__ import annotations

from torch import nn

from hf_glu.activation.module import OwnedModule
from hf_glu.compat.of_models import INITIALIZED


def initialize(module: nn.Module) -> bool:
    """Initialise a module of ours, unless that has been done; return whether it was done now.

    What a checkpoint has loaded stays: ``transformers.initialization`` leaves it alone.
    """
    if not isinstance(module, OwnedModule) or INITIALIZED.of(module, False):
        return False
    module.reset_parameters()
    INITIALIZED.put(module, True)
    return True
