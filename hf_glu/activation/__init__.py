"""The activations that hf_glu adds: importing this package fills the registry."""

# First of all: the plugin's hook on it imports the modules below, which then find it complete.
import transformers.activations  # noqa: F401  # isort: split

from hf_glu.activation import gated as _gated  # noqa: F401  (registers)
from hf_glu.activation import learnable as _learnable  # noqa: F401  (registers)
from hf_glu.activation import moa as _moa  # noqa: F401  (registers)
from hf_glu.activation import modulated as _modulated  # noqa: F401  (registers)
from hf_glu.activation import stateful as _stateful  # noqa: F401  (registers)
from hf_glu.activation.elementwise import build_elementwise, is_elementwise
from hf_glu.activation.module import GatedActivation, OwnedActivation, OwnedModule
from hf_glu.registry import registry

register_activation = registry.add

__all__ = [
    "GatedActivation",
    "OwnedActivation",
    "OwnedModule",
    "build_elementwise",
    "is_elementwise",
    "register_activation",
    "registry",
]
