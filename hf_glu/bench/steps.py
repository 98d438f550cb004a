"""Contenders that several benches share: a training step, and Llama's FFN with different gates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from hf_glu.bench.options import BenchOptions, Shape
from hf_glu.bench.running import Contender


def ffn_shape(options: BenchOptions, tokens: int, hidden: int, width: int) -> Shape:
    """Return the shape of an FFN's training step; ``hidden`` and ``width`` unless asked."""
    return {
        "of": "FFN",
        "pass": "forward + backward",
        "tokens": tokens,
        "hidden": options.hidden or hidden,
        "width": options.width or width,
        "dtype": options.dtype,
    }


def trained(modules: Mapping[str, nn.Module], x: Tensor) -> dict[str, Contender]:
    """Return a forward and backward pass of each module, into its parameters and ``x``, which requires a gradient."""
    gradient = torch.randn_like(x)

    def step(module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(x).backward(gradient)

    return {
        name: Contender(call=partial(step, module), forward=partial(module, x), parameters=tuple(module.parameters()))
        for name, module in modules.items()
    }


def llama_ffns(gates: Mapping[str, nn.Module], hidden: int, width: int) -> dict[str, nn.Module]:
    """Build Llama's FFN with each gate, all with the same weights."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = LlamaConfig(hidden_size=hidden, intermediate_size=width, num_attention_heads=1)
    base, made = LlamaMLP(config), {}
    for name, gate in gates.items():
        module = LlamaMLP(config)
        module.load_state_dict(base.state_dict())
        module.act_fn = gate
        made[name] = module
    return made
