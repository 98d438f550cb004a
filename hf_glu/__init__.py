"""Gated feed-forward networks for stock Hugging Face Transformers models.

``import hf_glu`` registers the plugin; it imports neither torch nor Transformers, but hooks them as they are imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_glu.plugin import is_registered, register, scoped, unregister

if TYPE_CHECKING:
    from hf_glu.activation import register_activation as register_activation
    from hf_glu.activation.listing import activations as activations
    from hf_glu.checkpoint import convert_checkpoint as convert_checkpoint
    from hf_glu.config import GluConfig as GluConfig
    from hf_glu.conversion import convert as convert
    from hf_glu.conversion import freeze_mix as freeze_mix
    from hf_glu.conversion import plan as plan
    from hf_glu.conversion import revert as revert
    from hf_glu.conversion import split_experts as split_experts
    from hf_glu.conversion import to_native as to_native
    from hf_glu.experts.losses import with_router_losses as with_router_losses
    from hf_glu.experts.statistics import active_parameters as active_parameters
    from hf_glu.experts.statistics import expert_statistics as expert_statistics
    from hf_glu.exporting import export as export
    from hf_glu.inspection import record_gates as record_gates
    from hf_glu.layers.lean import fuse as fuse
    from hf_glu.layers.lean import save_memory as save_memory
    from hf_glu.layers.sites import find_sites as find_sites
    from hf_glu.layers.sparse import skip_zeros as skip_zeros
    from hf_glu.publishing.push import push as push
    from hf_glu.registry import Activation as Activation
    from hf_glu.steering import context_vector as context_vector
    from hf_glu.steering import modulation as modulation
    from hf_glu.streaming import convert_stream as convert_stream
    from hf_glu.training.annealing import AnnealCallback as AnnealCallback
    from hf_glu.training.annealing import anneal as anneal
    from hf_glu.training.gates import count_parameters as count_parameters
    from hf_glu.training.gates import train_all as train_all
    from hf_glu.training.gates import train_only_gates as train_only_gates
    from hf_glu.training.groups import parameter_groups as parameter_groups
    from hf_glu.training.homeostasis import homeostasis as homeostasis
    from hf_glu.training.parts import frozen_activations as frozen_activations
    from hf_glu.training.peft import lora_config as lora_config
    from hf_glu.verification import verify as verify

__version__ = "0.1.0"

# public name -> the module that has it, imported on first use
_LAZY = {
    "Activation": "hf_glu.registry",
    "GluConfig": "hf_glu.config",
    "AnnealCallback": "hf_glu.training.annealing",
    "activations": "hf_glu.activation.listing",
    "active_parameters": "hf_glu.experts.statistics",
    "anneal": "hf_glu.training.annealing",
    "context_vector": "hf_glu.steering",
    "convert": "hf_glu.conversion",
    "convert_checkpoint": "hf_glu.checkpoint",
    "count_parameters": "hf_glu.training.gates",
    "convert_stream": "hf_glu.streaming",
    "expert_statistics": "hf_glu.experts.statistics",
    "export": "hf_glu.exporting",
    "find_sites": "hf_glu.layers.sites",
    "freeze_mix": "hf_glu.conversion",
    "frozen_activations": "hf_glu.training.parts",
    "fuse": "hf_glu.layers.lean",
    "homeostasis": "hf_glu.training.homeostasis",
    "lora_config": "hf_glu.training.peft",
    "modulation": "hf_glu.steering",
    "parameter_groups": "hf_glu.training.groups",
    "plan": "hf_glu.conversion",
    "push": "hf_glu.publishing.push",
    "record_gates": "hf_glu.inspection",
    "revert": "hf_glu.conversion",
    "register_activation": "hf_glu.activation",
    "save_memory": "hf_glu.layers.lean",
    "skip_zeros": "hf_glu.layers.sparse",
    "split_experts": "hf_glu.conversion",
    "to_native": "hf_glu.conversion",
    "train_all": "hf_glu.training.gates",
    "train_only_gates": "hf_glu.training.gates",
    "verify": "hf_glu.verification",
    "with_router_losses": "hf_glu.experts.losses",
}

__all__ = ["__version__", "is_registered", "register", "scoped", "unregister", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'hf_glu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


register()
