"""What one decoded token costs beside the arithmetic: operations of torch and calls of ours, in each layer."""

import sys
from collections import Counter
from functools import cache

import pytest
import torch
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import hf_glu

IDS = torch.arange(1, 10).unsqueeze(0)
SIZES = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
# name -> operations more than in a stock layer, and calls of hf_glu's functions, both at most
LIMITS = {
    "swiglu": (0, 0), "stateful_silu": (6, 14), "canon_silu": (7, 14), "smear_silu": (8, 16), "modulated_silu": (9, 12),
    "swiglu*8": (27, 50), "swiglu*2,geglu*2,reglu*2,glu*2": (28, 68),  # by which experts are chosen
}  # fmt: skip


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def make(name, layers):
    config = LlamaConfig(**SIZES, num_hidden_layers=layers)
    if "*" not in name:
        config.hidden_act = name
    model = LlamaForCausalLM(config)
    if "*" in name:
        hf_glu.convert(model, "swiglu", experts=name, top_k=2, check=False)
    return model.eval()


@cache
def counts(name, layers):
    """Return how many operations, and calls of hf_glu's functions, one token needs."""
    model, calls, operations = make(name, layers), Counter(), Operations()

    def called(frame, event, _):
        if event == "call":
            calls[frame.f_globals.get("__name__", "").startswith("hf_glu.")] += 1

    def decode():
        nonlocal cache
        cache = model(IDS[:, :1], past_key_values=cache, use_cache=True).past_key_values

    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        decode()
        with operations:
            decode()
        before = sys.getprofile()
        sys.setprofile(called)
        try:
            decode()
        finally:
            sys.setprofile(before)
    return torch.tensor([operations.count, calls[True]])


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="torch splits some operations in several")
@pytest.mark.parametrize("name", LIMITS)
def test_a_layer_needs_no_more_than_it_must(name):
    stock, ours = (counts(each, 3) - counts(each, 2) for each in ("silu", name))
    assert stock[0] > 0
    assert stock[1] == 0
    more = (ours - stock).tolist()
    assert all(found <= most for found, most in zip(more, LIMITS[name], strict=True)), more
