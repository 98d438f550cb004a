"""The cost of activations with parameters of their own: Llama's FFN with each, beside the one with plain swiglu.

Pairs: T = 1,024 tokens, H = 768, W = 2,048; forward and backward pass, all parameters trained and away from 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from hf_glu.activation import registry
from hf_glu.activation.context import Reading
from hf_glu.activation.context.passes import enter, leave
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.activation.kernels.compiled import has_compiler
from hf_glu.activation.modulated import Modulation
from hf_glu.activation.module import OwnedActivation
from hf_glu.bench.options import Shape
from hf_glu.bench.running import DTYPES, BenchOptions, Cell, Claim, Contender
from hf_glu.bench.steps import ffn_shape, llama_ffns, trained
from hf_glu.config.context import ContextOptions
from hf_glu.config.glu import GluConfig
from hf_glu.ffn.lean import fuse, keep_less

TOKENS, HIDDEN, WIDTH = 1024, 768, 2048
FUNCTIONS = ("silu", "gelu", "relu", "tanh")
PLAIN = "swiglu"
STD = 0.1
# contender -> its gate, and the largest ratios of times and of kept bytes
CONTENDERS = {
    "modulated_swiglu": ("modulated_silu", 1.10, None),
    "learnable_swiglu": ("learnable_silu", 1.15, None),
    "moa_swiglu": ("moa_silu", 1.30, None),
    "modulated_swiglu, save_memory": ("modulated_silu", 1.10, None),
    "learnable_swiglu, save_memory": ("learnable_silu", 1.15, None),
    "moa_swiglu, save_memory": ("moa_silu", 1.30, 1.5),
    "modulated_swiglu, fused": ("modulated_silu", 1.05, None),
    "learnable_swiglu, fused": ("learnable_silu", 1.08, None),
    "moa_swiglu, fused": ("moa_silu", 1.15, None),
}


def cells(options: BenchOptions) -> Iterator[Cell]:
    """Yield a cell for each number of tokens."""
    claims = {
        name: Claim(peers=(PLAIN,), target=target, saved_peers=(PLAIN,), saved_target=saved)
        for name, (_, target, saved) in CONTENDERS.items()
    }
    for tokens in options.sizes((TOKENS,)):
        shape: Shape = {**ffn_shape(options, tokens, HIDDEN, WIDTH), "functions": " ".join(FUNCTIONS)}
        yield Cell(shape=shape, build=partial(ffns, shape), claims=claims)


def gate(name: str, shape: Shape) -> nn.Module:
    """Build the gate ``name`` with random parameters; a modulated one gets a random context vector for each token."""
    act = registry[name].factory()
    assert isinstance(act, OwnedActivation)
    act.configure(GluConfig(mix={"functions": list(FUNCTIONS)}), shape["width"])
    with torch.no_grad():
        for parameter in act.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=STD)
    for module in act.modules():
        if isinstance(module, Modulation):
            vector = torch.rand(1, shape["tokens"], ContextOptions.size).to(DTYPES[shape["dtype"]])
            reading = Reading(1, shape["tokens"], vector=vector.requires_grad_())
            module.register_forward_pre_hook(partial(_tell, reading))
            module.register_forward_hook(_forget)
    return act


def _tell(reading: Reading, module: nn.Module, args: object) -> None:
    enter(module, reading)


def _forget(module: nn.Module, args: object, output: object) -> None:
    leave(module)


def ffns(shape: Shape) -> dict[str, Contender]:
    """Build Llama's FFN with each gate, all with the same weights."""
    torch.manual_seed(0)
    gates = {PLAIN: build_elementwise("silu")} | {name: gate(row[0], shape) for name, row in CONTENDERS.items()}
    for name, act in gates.items():
        if name.endswith("save_memory"):
            keep_less(act, None)
        if name.endswith("fused") and has_compiler("cpu"):
            fuse(act, device="cpu")
    dtype, made = DTYPES[shape["dtype"]], llama_ffns(gates, shape["hidden"], shape["width"])
    x = torch.randn(1, shape["tokens"], shape["hidden"]).to(dtype).requires_grad_()
    return trained({name: module.to(dtype) for name, module in made.items()}, x)
