"""Everything inside act(x). Importing this fills the registry, and gives what the other rooms use."""

# First of all: the plugin's hook on it imports the modules below, which then find it complete.
import transformers.activations  # noqa: F401  # isort: split

from hf_glu.activation import kinds as _kinds  # noqa: F401  (registers)
from hf_glu.activation.elementwise import build_elementwise, is_elementwise
from hf_glu.activation.module import GatedActivation, OwnedActivation, OwnedModule
from hf_glu.config.glu import GluConfig
from hf_glu.config.registry import registry

register_activation = registry.add

__all__ = [
    "GatedActivation",
    "GluConfig",
    "OwnedActivation",
    "OwnedModule",
    "build_elementwise",
    "is_elementwise",
    "register_activation",
    "registry",
]
