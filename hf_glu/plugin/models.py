"""Hook of ``transformers.modeling_utils``: building, initialising and loading models with gated FFNs."""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

from hf_glu.activation.module import OwnedModule
from hf_glu.compat.of_models import FINALIZE_LOADING, INIT_WEIGHTS, INITIALIZE_WEIGHTS
from hf_glu.compat.of_others import CONVERSIONS
from hf_glu.ffn.build import build_ffns, is_ours
from hf_glu.ffn.completeness import refuse_losses
from hf_glu.ffn.config_fields import sync_derived
from hf_glu.ffn.holders import note
from hf_glu.ffn.naming import unname
from hf_glu.ffn.pretrained import initialize
from hf_glu.ffn.replaced import check_forwards
from hf_glu.ffn.sparse_linear import refuse_swapped, resume_sparsity
from hf_glu.ffn.tensor_parallel import replicate
from hf_glu.instruments.equality import align
from hf_glu.plugin.loading import check_source, converters, forget_converters, is_as_stored
from hf_glu.plugin.patching import Patches, require
from hf_glu.plugin.pushing import install_push
from hf_glu.plugin.saving import install_saving


def install(module: ModuleType, patches: Patches) -> None:
    """Wrap seven methods of ``PreTrainedModel`` and its weight conversions; all pass through without a gate of ours."""
    model_class = require(module, "PreTrainedModel")
    plain_init = require(model_class, "__init__", "config")
    plain_post_init = require(model_class, "post_init")
    plain_finalize = require(model_class, FINALIZE_LOADING.name, "model", "load_config", "loading_info")
    plain_mapping = require(module, CONVERSIONS.name, "model")

    @wraps(plain_init)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if hasattr(config, "__dict__"):
            sync_derived(config)
        plain_init(self, config, *args, **kwargs)
        note(self)

    @wraps(plain_post_init)
    def post_init(self: Any) -> None:
        check_forwards(self, self.config)
        built = build_ffns(self, self.config)
        plain_post_init(self)
        replicate(self, [*built, *resume_sparsity(self, self.config)])  # a split would weigh parts of rows

    @wraps(plain_mapping)
    def conversion_mapping(model: Any, *args: Any, **kwargs: Any) -> Any:
        return [*plain_mapping(model, *args, **kwargs), *converters(model)]

    @wraps(plain_finalize)
    def finalize(model: Any, load_config: Any, loading_info: Any) -> Any:
        check_source(model, load_config, forget_converters(model))
        refuse_losses(model, load_config, loading_info)
        info = plain_finalize(model, load_config, loading_info)
        refuse_swapped(model)
        if is_ours(model):
            align(model)
            if not is_as_stored(model, load_config):
                unname(model)
        return info

    patches.set(model_class, "__init__", init)
    patches.set(model_class, "post_init", post_init)
    patches.set(module, CONVERSIONS.name, conversion_mapping)
    patches.set(model_class, FINALIZE_LOADING.name, staticmethod(finalize))
    _install_initialising(model_class, patches)
    install_saving(model_class, patches)
    install_push(model_class, patches)


def _install_initialising(model_class: Any, patches: Patches) -> None:
    plain_initialize = require(model_class, INITIALIZE_WEIGHTS.name, "module")
    plain_weights = require(model_class, INIT_WEIGHTS.name, "module")

    @wraps(plain_initialize)
    def initialize_weights(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        if not initialize(module):
            plain_initialize(self, module, *args, **kwargs)

    @wraps(plain_weights)
    def init_weights(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(module, OwnedModule):  # in model.apply(model._init_weights)
            module.reset_parameters()
        plain_weights(self, module, *args, **kwargs)

    patches.set(model_class, INITIALIZE_WEIGHTS.name, initialize_weights)
    patches.set(model_class, INIT_WEIGHTS.name, init_weights)
