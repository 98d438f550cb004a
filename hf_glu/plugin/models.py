"""Hook of ``transformers.modeling_utils``: building, initialising and loading models with gated FFNs."""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

from hf_glu.activation.module import OwnedModule
from hf_glu.errors import CheckpointError
from hf_glu.layers.build import build_ffns, owned_activations
from hf_glu.layers.fields import activation_of, sync_derived
from hf_glu.layers.sites import Site, find_sites
from hf_glu.layers.tensor_parallel import replicate_widened
from hf_glu.plugin.loading import converters, forget_converters
from hf_glu.plugin.patching import Patches, require


def install(module: ModuleType, patches: Patches) -> None:
    """Wrap four methods of ``PreTrainedModel`` and its weight conversions; all pass through without a gate of ours."""
    model_class = require(module, "PreTrainedModel")
    plain_init = require(model_class, "__init__", "config")
    plain_post_init = require(model_class, "post_init")
    plain_initialize = require(model_class, "_initialize_weights", "module")
    plain_finalize = require(model_class, "_finalize_model_loading", "model", "load_config", "loading_info")
    plain_mapping = require(module, "get_model_conversion_mapping", "model")

    @wraps(plain_init)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if hasattr(config, "__dict__"):
            sync_derived(config)
        plain_init(self, config, *args, **kwargs)

    @wraps(plain_post_init)
    def post_init(self: Any) -> None:
        built = build_ffns(self, self.config)
        plain_post_init(self)
        replicate_widened(self, built)

    @wraps(plain_initialize)
    def initialize_weights(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(module, OwnedModule) and not getattr(module, "_is_hf_initialized", False):
            module.reset_parameters()
            module._is_hf_initialized = True  # type: ignore[assignment]
            return
        plain_initialize(self, module, *args, **kwargs)

    @wraps(plain_mapping)
    def conversion_mapping(model: Any, *args: Any, **kwargs: Any) -> Any:
        return [*plain_mapping(model, *args, **kwargs), *converters(model)]

    @wraps(plain_finalize)
    def finalize(model: Any, load_config: Any, loading_info: Any) -> Any:
        forget_converters(model)
        refuse_mismatch(model, load_config, loading_info)
        return plain_finalize(model, load_config, loading_info)

    patches.set(model_class, "__init__", init)
    patches.set(model_class, "post_init", post_init)
    patches.set(model_class, "_initialize_weights", initialize_weights)
    patches.set(module, "get_model_conversion_mapping", conversion_mapping)
    patches.set(model_class, "_finalize_model_loading", staticmethod(finalize))


def refuse_mismatch(model: Any, load_config: Any, loading_info: Any) -> None:
    """Raise where a checkpoint's FFN has another shape than the model's gated one, whatever the caller ignores.

    ``ignore_mismatched_sizes=True`` would fill it at random.
    """
    mismatched = {key: (found, wanted) for key, found, wanted in loading_info.mismatched_keys}
    if not mismatched or not (owned_activations(model) or getattr(model.config, "hf_glu", None)):
        return
    for site in find_sites(model):
        for key in _projection_keys(site):
            if key in mismatched:
                found, wanted = mismatched[key]
                name = activation_of(model.config)
                raise CheckpointError(
                    f"{load_config.pretrained_model_name_or_path}: {key} is {list(found)} in the checkpoint, but "
                    f"{name} with the options in config.hf_glu needs {list(wanted)}. To turn a dense checkpoint into a "
                    f"gated model, load it as it is and call hf_glu.convert(model, {name!r}), or run "
                    f"`hf-glu convert SRC DST --to {name}`"
                )


def _projection_keys(site: Site) -> list[str]:
    prefix = f"{site.name}." if site.name else ""
    paths = [path for path in (site.row.gate, site.row.in_proj, site.row.out_proj) if path]
    return [f"{prefix}{path}.{kind}" for path in paths for kind in ("weight", "bias")]
