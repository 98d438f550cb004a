"""Hook of ``kernels`` and Liger: what swaps the forward of FFNs for one that computes SiLU leaves other gates alone.

Both libraries go through a model's modules and give each one that they know by its class or its place another forward.
All other modules (norms, losses, attention) get their kernels.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

from hf_glu.compat.of_others import KERNELIZE_LAYER, LIGER_BIND
from hf_glu.plugin.patching import Patches


def install(module: ModuleType, patches: Patches) -> None:
    """Wrap the one function of either library that gives a module another forward."""
    for row in (KERNELIZE_LAYER, LIGER_BIND):
        plain = row.of(module, None) if module.__name__ == row.module else None
        if plain is not None:
            patches.set(module, row.name, _sparing(plain))


def _sparing(plain: Any) -> Any:
    @wraps(plain)
    def replace(module: Any, *args: Any, **kwargs: Any) -> None:
        from torch import nn

        from hf_glu.ffn.replaced import no_kernel_for

        if not (isinstance(module, nn.Module) and no_kernel_for(module)):
            plain(module, *args, **kwargs)

    return replace
