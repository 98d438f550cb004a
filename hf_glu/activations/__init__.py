"""The activations that hf_glu adds: importing this package fills the registry."""

from hf_glu.activations import gated as _entries  # noqa: F401  (registers)
from hf_glu.activations.elementwise import build_elementwise, is_elementwise
from hf_glu.activations.module import GatedActivation, OwnedModule
from hf_glu.registry import registry

__all__ = ["GatedActivation", "OwnedModule", "build_elementwise", "is_elementwise", "registry"]
