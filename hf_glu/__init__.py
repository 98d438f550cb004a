"""Gated feed-forward networks for stock Hugging Face Transformers models.

``import hf_glu`` registers the plugin; it imports neither torch nor Transformers, but hooks them as they are imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_glu.plugin import is_registered, register, scoped, unregister
from hf_glu.version import __version__

if TYPE_CHECKING:
    from hf_glu import tasks as tasks
    from hf_glu.activation import register_activation as register_activation
    from hf_glu.activation.kernels import formulas as functional  # noqa: F401
    from hf_glu.activation.listing import activations as activations
    from hf_glu.checkpoint.convert import convert_checkpoint as convert_checkpoint
    from hf_glu.checkpoint.streaming import convert_stream as convert_stream
    from hf_glu.checkpoint.verification import verify as verify
    from hf_glu.config.glu import GluConfig as GluConfig
    from hf_glu.config.registry import Activation as Activation
    from hf_glu.conversion import convert as convert
    from hf_glu.conversion import freeze_mix as freeze_mix
    from hf_glu.conversion import grow_experts as grow_experts
    from hf_glu.conversion import merge_experts as merge_experts
    from hf_glu.conversion import plan as plan
    from hf_glu.conversion import revert as revert
    from hf_glu.conversion import split_experts as split_experts
    from hf_glu.conversion import to_native as to_native
    from hf_glu.conversion.sparsify import sparsify as sparsify
    from hf_glu.ffn.experts.losses import with_router_losses as with_router_losses
    from hf_glu.ffn.lean import fuse as fuse
    from hf_glu.ffn.lean import save_memory as save_memory
    from hf_glu.ffn.sites import find_sites as find_sites
    from hf_glu.ffn.sparse import skip_zeros as skip_zeros
    from hf_glu.instruments.gates import record_gates as record_gates
    from hf_glu.instruments.routing import active_parameters as active_parameters
    from hf_glu.instruments.routing import expert_statistics as expert_statistics
    from hf_glu.instruments.steering.by_hand import context_vector as context_vector
    from hf_glu.instruments.steering.by_hand import modulation as modulation
    from hf_glu.publishing.export import export as export
    from hf_glu.publishing.hub.push import push as push
    from hf_glu.publishing.modulations import GateModulation as GateModulation
    from hf_glu.publishing.modulations import fit_modulation as fit_modulation
    from hf_glu.tasks import metrics as metrics
    from hf_glu.training.language.heal import heal as heal
    from hf_glu.training.language.pretraining import perplexity as perplexity
    from hf_glu.training.language.pretraining import pretrain as pretrain
    from hf_glu.training.parameters.annealing import AnnealCallback as AnnealCallback
    from hf_glu.training.parameters.annealing import anneal as anneal
    from hf_glu.training.parameters.gates import count_parameters as count_parameters
    from hf_glu.training.parameters.gates import train_all as train_all
    from hf_glu.training.parameters.gates import train_only_gates as train_only_gates
    from hf_glu.training.parameters.groups import parameter_groups as parameter_groups
    from hf_glu.training.parameters.homeostasis import homeostasis as homeostasis
    from hf_glu.training.parameters.muon import muon as muon
    from hf_glu.training.parameters.parts import frozen_activations as frozen_activations
    from hf_glu.training.parameters.peft import lora_config as lora_config
    from hf_glu.training.watch import WatchCallback as WatchCallback

# public name -> the module that has it, imported on first use
_LAZY = {
    "Activation": "hf_glu.config.registry",
    "GluConfig": "hf_glu.activation",  # which registers the kinds that have sections in it
    "GateModulation": "hf_glu.publishing.modulations",
    "AnnealCallback": "hf_glu.training.parameters.annealing",
    "WatchCallback": "hf_glu.training.watch",
    "activations": "hf_glu.activation.listing",
    "active_parameters": "hf_glu.instruments.routing",
    "anneal": "hf_glu.training.parameters.annealing",
    "context_vector": "hf_glu.instruments.steering.by_hand",
    "convert": "hf_glu.conversion",
    "convert_checkpoint": "hf_glu.checkpoint.convert",
    "count_parameters": "hf_glu.training.parameters.gates",
    "convert_stream": "hf_glu.checkpoint.streaming",
    "expert_statistics": "hf_glu.instruments.routing",
    "export": "hf_glu.publishing.export",
    "find_sites": "hf_glu.ffn.sites",
    "fit_modulation": "hf_glu.publishing.modulations",
    "freeze_mix": "hf_glu.conversion",
    "frozen_activations": "hf_glu.training.parameters.parts",
    "fuse": "hf_glu.ffn.lean",
    "grow_experts": "hf_glu.conversion",
    "heal": "hf_glu.training.language.heal",
    "homeostasis": "hf_glu.training.parameters.homeostasis",
    "lora_config": "hf_glu.training.parameters.peft",
    "modulation": "hf_glu.instruments.steering.by_hand",
    "merge_experts": "hf_glu.conversion",
    "muon": "hf_glu.training.parameters.muon",
    "parameter_groups": "hf_glu.training.parameters.groups",
    "perplexity": "hf_glu.training.language.pretraining",
    "plan": "hf_glu.conversion",
    "pretrain": "hf_glu.training.language.pretraining",
    "push": "hf_glu.publishing.hub.push",
    "record_gates": "hf_glu.instruments.gates",
    "revert": "hf_glu.conversion",
    "register_activation": "hf_glu.activation",
    "save_memory": "hf_glu.ffn.lean",
    "skip_zeros": "hf_glu.ffn.sparse",
    "sparsify": "hf_glu.conversion.sparsify",
    "split_experts": "hf_glu.conversion",
    "to_native": "hf_glu.conversion",
    "train_all": "hf_glu.training.parameters.gates",
    "train_only_gates": "hf_glu.training.parameters.gates",
    "verify": "hf_glu.checkpoint.verification",
    "with_router_losses": "hf_glu.ffn.experts.losses",
}

__all__ = ["__version__", "is_registered", "register", "scoped", "unregister", *_LAZY]


# modules that are public under the package's own name
_MODULES = {
    "functional": "hf_glu.activation.kernels.formulas",
    "metrics": "hf_glu.tasks.metrics",
    "tasks": "hf_glu.tasks",
}


if not TYPE_CHECKING:  # to whose readers every misspelt name would be one of these

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(_MODULES[name])
        if name in _LAZY:
            value = getattr(import_module(_LAZY[name]), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module 'hf_glu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_MODULES})


register()
