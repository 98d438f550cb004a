"""Pico Mamba models, plain and with states in their mixers that do something."""

from __future__ import annotations

from typing import Any

import torch
import transformers

import hf_glu
from hf_glu.activation.stateful import Memory

_MAMBA2 = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16}
MODELS = {"Mamba": {"state_size": 8}, "FalconMamba": {"state_size": 8}, "Mamba2": _MAMBA2}


def make(name: str, **more: Any) -> Any:
    """Return a pico model of one of ``MODELS``, in evaluation mode, that generates without end."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, **MODELS[name], **more}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    model.generation_config.eos_token_id = None
    return model


def awake(name: str) -> Any:
    """Return a model converted to a stateful SwiGLU whose states do something."""
    model = make(name)
    hf_glu.convert(model, "stateful_swiglu", check=False)
    with torch.no_grad():
        for memory in (module for module in model.modules() if isinstance(module, Memory)):
            memory.alpha.normal_(std=2)
            memory.beta.normal_(std=2)
    return model
