"""Tools that change a model's weights as it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ecosystem import Make, answers, saved
from torch import nn


def _with_weights_of(model: Any, quantized: Any, dequantize: Any) -> dict[str, torch.Tensor]:
    """Return the answers of a model whose linear layers have the weights that those of a quantized one stand for."""
    changed = 0
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, nn.Linear) and (weight := dequantize(module)) is not None:
                model.get_submodule(name).weight.copy_(weight)
                changed += 1
    assert changed, "nothing was quantized"
    return answers(model)


def torchao(make: Make, folder: Path) -> tuple[Any, Any]:
    """``from_pretrained(quantization_config=TorchAoConfig(...))``: int8 weights."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = make()
    options = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    quantized = type(model).from_pretrained(saved(model, folder), quantization_config=options).eval()

    def dequantize(module: nn.Linear) -> Any:
        return (
            module.weight.dequantize()
            if hasattr(module.weight, "dequantize") and type(module.weight) is not nn.Parameter
            else None
        )

    return answers(quantized), _with_weights_of(model, quantized, dequantize)


def bitsandbytes(make: Make, folder: Path) -> tuple[Any, Any]:
    """``from_pretrained(quantization_config=BitsAndBytesConfig(load_in_4bit=True))``."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    model = make()
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    quantized = type(model).from_pretrained(
        saved(model, folder), quantization_config=options, device_map="cpu", dtype=torch.float32
    )

    def dequantize(module: nn.Module) -> Any:
        if not isinstance(module, Linear4bit):
            return None
        return dequantize_4bit(module.weight.data, module.weight.quant_state)

    return answers(quantized.eval()), _with_weights_of(model, quantized, dequantize)


def offloaded(make: Make, folder: Path) -> tuple[Any, Any]:
    """Accelerate's ``device_map`` with layers on the disk: forwards are wrapped, weights come and go."""
    expected = answers(model := make())
    source = saved(model, folder / "model")
    places = {name: "cpu" for name, _ in model.named_children()}
    base = model.base_model_prefix
    places.pop(base)
    places |= {f"{base}.{name}": "cpu" for name, _ in model.base_model.named_children() if name != "layers"}
    places |= {f"{base}.layers.0": "cpu", f"{base}.layers.1": "disk"}
    found = type(model).from_pretrained(source, device_map=places, offload_folder=str(folder / "disk"))
    return answers(found.eval()), expected
