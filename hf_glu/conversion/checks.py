"""Models that can't be converted as they are, each with the one line that says what to do."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from hf_glu.compat.of_torch import FLAT_PARAMETER, OWN_PARAMETERS
from hf_glu.errors import ConversionError
from hf_glu.ffn.forward import projections
from hf_glu.ffn.sites import convertible_sites


def check_convertible(model: Any) -> None:
    """Raise ConversionError where a conversion in place would go wrong."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ConversionError(f"a Transformers model is needed, got {type(model).__name__}")
    if is_part(type(model)):
        raise ConversionError(
            f"{type(model).__name__} is a part of a model, whose config says what all of it is: hand over the whole "
            "model, with layers='encoder' or another choice of its layers"
        )
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ConversionError(
            "the model is wrapped by PEFT: merge the adapter first (merge_and_unload), or convert before"
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ConversionError("the model is quantized: convert the unquantized checkpoint, then quantize the result")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh") or FLAT_PARAMETER.name in name:
            raise ConversionError("the model's parameters are sharded (FSDP, DeepSpeed, TP): convert before sharding")
        if not parameter.is_floating_point():
            raise ConversionError(f"{name} is {parameter.dtype}: convert the unquantized checkpoint, then quantize")
    for site in convertible_sites(model):
        for linear in projections(site) if site.kind != "experts" else ():
            if not {"weight", "bias"} <= set(OWN_PARAMETERS.of(linear)):
                raise ConversionError(
                    f"a projection of {site.name} computes its weight anew in each pass (pruning, weight_norm, "
                    "spectral_norm or another parametrization): make it permanent first (prune.remove, "
                    "remove_weight_norm, parametrize.remove_parametrizations)"
                )


def is_part(model_class: type) -> bool:
    """Tell whether a class is one of Transformers' own that only stands inside of others, as T5's stacks do."""
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
