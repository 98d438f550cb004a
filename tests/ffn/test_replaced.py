"""Whose FFNs are refused: what ignores a gate of ours; never what somebody puts into a stock model."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

import pytest
from pico import make_native
from torch import nn
from torch.nn import functional
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP

import hf_glu
from hf_glu.errors import ConversionError


class Fixed(LlamaMLP):
    """A user's own, for one activation."""

    def forward(self, x: Any) -> Any:
        return self.down_proj(functional.gelu(self.gate_proj(x)) * self.up_proj(x))


class Parted(LlamaMLP):
    """One whose activation is applied by a method."""

    def product(self, x: Any) -> Any:
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Any) -> Any:
        return self.down_proj(self.product(x))


def product(mlp: Any, x: Any) -> Any:
    return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)


class Helped(LlamaMLP):
    """One that leaves it to a function."""

    def forward(self, x: Any) -> Any:
        return self.down_proj(product(self, x))


class Whole(nn.Module):
    """An FFN without a module for its activation."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(config.hidden_size, config.intermediate_size) for _ in range(2))
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    forward = Fixed.forward


@pytest.mark.parametrize("own", [Fixed, Parted, Helped, Whole])
def test_a_stock_model_may_have_anybodys_ffn(own, monkeypatch):
    monkeypatch.setattr(modeling_llama, "LlamaMLP", own)
    assert isinstance(make_native("llama", hidden_act="gelu").model.layers[0].mlp, own)
    if own in (Fixed, Whole):
        with pytest.raises(ConversionError, match=f"computed by test_replaced.{own.__name__}"):
            make_native("llama", hidden_act="stateful_swiglu")
    else:
        make_native("llama", hidden_act="stateful_swiglu")


def test_libraries_whose_kernels_have_their_own_are_refused(monkeypatch):
    kernel = type("LigerSwiGLUMLP", (Fixed,), {"__module__": "liger_kernel.transformers.swiglu"})
    monkeypatch.setattr(modeling_llama, "LlamaMLP", kernel)
    make_native("llama")
    with pytest.raises(ConversionError, match="computed by"):
        make_native("llama", hidden_act="gelu")


def test_a_model_of_somebody_elses_has_ffns_of_its_own():
    from transformers import LlamaForCausalLM

    home = "transformers_modules.somewhere.modeling"
    sys.modules[home] = ModuleType(home)
    try:
        remote = type("RemoteLlama", (LlamaForCausalLM,), {"__module__": home})
        model = remote(make_native("llama").config)
        model.model.layers[0].mlp = type("RemoteMLP", (Whole,), {"__module__": home})(model.config)
        hf_glu.convert(model, "reglu", check=False)  # the FFN of the other layer
        assert [type(layer.mlp).__name__ for layer in model.model.layers] == ["RemoteMLP", "LlamaMLP"]
        assert type(hf_glu.find_sites(model)[-1].act) is nn.ReLU
    finally:
        del sys.modules[home]


@pytest.mark.parametrize("around", ["timed", "partial", "method", "helper"])
def test_what_calls_the_stock_forward_is_converted(around):
    model = make_native("llama")
    for layer in model.model.layers:
        mlp, plain = layer.mlp, layer.mlp.forward
        if around == "timed":
            mlp.forward = _timed(plain)
        elif around == "partial":
            mlp.forward = functools.partial(plain)
        else:
            mlp.__class__ = Parted if around == "method" else Helped
    hf_glu.convert(model, "reglu", check=False)
    assert [type(site.act) for site in hf_glu.find_sites(model)] == [nn.ReLU, nn.ReLU]


def _timed(plain: Any) -> Any:
    def timed(*args: Any) -> Any:
        return plain(*args)

    return timed


def test_a_closure_over_the_old_activation_is_refused():
    model = make_native("llama")
    mlp = model.model.layers[0].mlp
    act, gate, up, down = mlp.act_fn, mlp.gate_proj, mlp.up_proj, mlp.down_proj
    mlp.forward = lambda x: down(act(gate(x)) * up(x))
    with pytest.raises(ConversionError, match="computed by"):
        hf_glu.convert(model, "reglu", check=False)
