"""Models and choices of sites that can't be converted, each with the one line that says what to do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor, nn

from hf_glu.compat.of_torch import FLAT_PARAMETER, OWN_PARAMETERS
from hf_glu.config.glu import GluConfig, name_at
from hf_glu.config.layers import check_layers, read_exclude, selected
from hf_glu.conversion.gguf import is_from_gguf, is_unpacked
from hf_glu.errors import ConversionError, NoSiteError, shown
from hf_glu.ffn.build import check_selection
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.forward import projections
from hf_glu.ffn.replaced import refuse_replaced
from hf_glu.ffn.sites import Site, convertible_sites, is_adapted
from hf_glu.ffn.sparse_linear import SparseLinear


def check_convertible(model: Any) -> None:
    """Raise ConversionError where a conversion in place would go wrong."""
    if isinstance(model, (str, os.PathLike)):
        raise ConversionError(
            f"a Transformers model is needed, got the {type(model).__name__} {shown(str(model))}: "
            "hf_glu.convert_checkpoint(SOURCE, DESTINATION, ...) converts a folder or a Hub id"
        )
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ConversionError(f"a Transformers model is needed, got {type(model).__name__}")
    if is_part(type(model)):
        raise ConversionError(
            f"{type(model).__name__} is a part of a model, whose config says what all of it is: hand over the whole "
            "model, with layers='encoder' or another choice of its layers"
        )
    if is_adapted(model):
        raise ConversionError(
            "the model is wrapped by PEFT: merge the adapter first (merge_and_unload), or convert before"
        )
    if is_from_gguf(model) and not is_unpacked(model):
        raise ConversionError("the model has blocks of a GGUF file: load it with GgufConfig(dequantize=True)")
    if not is_unpacked(model) and (getattr(model, "hf_quantizer", None) or getattr(model, "is_quantized", False)):
        raise ConversionError("the model is quantized: convert the unquantized checkpoint, then quantize the result")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh") or FLAT_PARAMETER.name in name:
            raise ConversionError("the model's parameters are sharded (FSDP, DeepSpeed, TP): convert before sharding")
        if not parameter.is_floating_point():
            raise ConversionError(f"{name} is {parameter.dtype}: convert the unquantized checkpoint, then quantize")
    sites = convertible_sites(model)
    refuse_replaced(model, sites)
    for site in sites:
        for linear in projections(site) if site.kind != "experts" else ():
            if type(linear.weight.data) is not Tensor:
                raise ConversionError(
                    f"a projection of {site.name} has a weight of the class {type(linear.weight.data).__name__} (a "
                    "quantizer's): convert the unquantized model, then quantize the result"
                )
            if not {"weight", "bias"} <= set(OWN_PARAMETERS.of(linear)):
                raise ConversionError(
                    f"a projection of {site.name} computes its weight anew in each pass (pruning, weight_norm, "
                    "spectral_norm or another parametrization): make it permanent first (prune.remove, "
                    "remove_weight_norm, parametrize.remove_parametrizations)"
                )


def check_dense(model: nn.Module) -> None:
    """Raise ConversionError where FFNs leave entries out: thresholds are of the FFNs that they were made for."""
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        raise ConversionError("the model is sparse: hf_glu.sparsify(model, keep=1) takes it off; then convert it")


def is_part(model_class: type) -> bool:
    """Return whether a class is one of Transformers' own that only stands inside of others, as T5's stacks do."""
    inside = model_class.__module__.startswith("transformers.models.")
    return inside and getattr(transformers, model_class.__name__, None) is not model_class


def check_values(model: nn.Module) -> None:
    """Raise ConversionError where parameters have no values (meta device, offloaded to disk)."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ConversionError(
                f"{name} is on the meta device and has no values: load the model in full, or name the gated "
                "activation in its config"
            )


def chosen_sites(
    model: nn.Module, layers: Any, exclude: str | None, targets: Mapping[str, str] | None = None
) -> list[Site]:
    """Return the sites that ``layers`` and the keys of ``targets`` select and ``exclude`` doesn't find.

    Raises:
        NoSiteError: there are none.
        OptionError: a layer that the model doesn't have, or no regular expression.
        ConversionError: the model has experts of ours.
    """
    if find_experts(model):
        raise ConversionError(
            f"{type(model).__name__} has experts of hf_glu's already: convert the dense checkpoint instead"
        )
    sites = convertible_sites(model)
    if not sites:
        raise NoSiteError(f"{type(model).__name__} has no feed-forward network that hf_glu knows")
    chosen, targets = check_layers(layers), {"all": "any"} if targets is None else targets
    check_selection(sites, GluConfig(layers=chosen, by_layer=dict(targets)))
    pattern = read_exclude(exclude)
    found = [
        site
        for site in sites
        if selected(chosen, site.layer, site.stack)
        and name_at(targets, site.layer, site.stack) is not None
        and not (pattern and pattern.search(site.name))
    ]
    if not found:
        raise NoSiteError(f"none of the {len(sites)} sites is chosen by layers={layers!r}, exclude={exclude!r}")
    return found
