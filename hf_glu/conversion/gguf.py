"""Models that Transformers has read from a GGUF file: plain float32 weights, on which a quantizer was left."""

from __future__ import annotations

from typing import Any

from torch import nn

METHOD = "gguf"
_LEFT = ("hf_quantizer", "quantization_method", "is_quantized")  # what Transformers sets on a model that it has read


def is_from_gguf(model: Any) -> bool:
    """Return whether a model still says that it comes from a GGUF file."""
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    return getattr(method, "value", method) == METHOD


def is_unpacked(model: nn.Module) -> bool:
    """Return whether a model from a GGUF file has none of the file's blocks left, only floating-point weights."""
    return is_from_gguf(model) and all(parameter.is_floating_point() for parameter in model.parameters())


def forget_gguf(model: nn.Module) -> None:
    """Take the quantizer off a model whose weights are unpacked: it is an ordinary model, which can be saved."""
    if is_unpacked(model):
        for name in _LEFT:
            vars(model).pop(name, None)
        vars(model.config).pop("quantization_config", None)
