"""Everything inside act(x). Importing this fills the registry, and imports neither torch nor Transformers."""

from hf_glu.activation import kinds as _kinds  # noqa: F401  (registers)
from hf_glu.config.glu import GluConfig
from hf_glu.config.registry import registry

register_activation = registry.add

__all__ = ["GluConfig", "register_activation", "registry"]
