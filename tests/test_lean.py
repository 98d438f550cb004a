"""What gated FFNs keep for the backward pass: the same numbers with less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparing import assert_same
from pico import FAMILIES
from torch import nn

import hf_glu
from hf_glu.activation import registry
from hf_glu.activation.gating import Gate, product_of
from hf_glu.bench.ffn import FusedFFN
from hf_glu.bench.timing import saved_bytes
from hf_glu.errors import NoSiteError
from hf_glu.functional import gated
from hf_glu.layers.lean import begin, end, watch_out

NAMES = ("swiglu", "geglu", "reglu", "glu", "bilinear", "geglu_new", "relu2glu", "tanh_glu")
HIDDEN, WIDTH, TOKENS = 16, 48, 37


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 35, 2 * 33, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_lean_product_is_the_plain_one(name, dtype, monkeypatch):
    monkeypatch.setattr("hf_glu.activation.gating.SIZE", 200)  # several blocks
    act, x = registry[name].factory(), inputs(dtype)
    lean, plain = act(x * 1), gated(x, act.phi, contiguous=act.contiguous)
    assert product_of(lean) is not None
    assert_same(lean, plain, "bitwise")
    gradient = torch.randn_like(plain)
    found, expected = (torch.autograd.grad(y, x, gradient)[0] for y in (lean, plain))
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_first_and_second_derivatives(name):
    act = registry[name].factory()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda leaf: act(leaf * 1), (x,))
    assert torch.autograd.gradgradcheck(lambda leaf: act(leaf * 1), (x,))


def test_the_lean_way_is_taken_where_there_is_a_gradient_and_no_parameter(monkeypatch):
    calls = []
    plain = Gate.apply
    monkeypatch.setattr(Gate, "apply", lambda *args: calls.append(1) or plain(*args))
    registry["swiglu"].factory()(inputs() * 1)
    assert len(calls) == 1
    registry["swiglu"].factory()(inputs())  # a leaf
    registry["swiglu"].factory()(inputs().detach())
    registry["prelu_glu"].factory()(inputs() * 1)
    with torch.no_grad():
        registry["swiglu"].factory()(inputs() * 1)
    assert len(calls) == 1


def make_ffn(name: str = "swiglu") -> FusedFFN:
    torch.manual_seed(0)
    weights = (torch.randn(WIDTH, HIDDEN), torch.randn(WIDTH, HIDDEN), torch.randn(HIDDEN, WIDTH))
    return FusedFFN(HIDDEN, WIDTH, name, weights)


def gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    x.grad = None
    module(x).square().sum().backward()
    return [x.grad.clone(), *(parameter.grad.clone() for parameter in module.parameters())]


@pytest.mark.parametrize("name", ["swiglu", "geglu_new"])
def test_save_memory_keeps_the_pre_activations_only(name):
    plain = make_ffn(name)
    lean = copy.deepcopy(plain)
    watch_out(lean.out_proj)
    x = torch.randn(2, TOKENS, HIDDEN, requires_grad=True)
    for found, expected in zip(gradients(lean, x), gradients(plain, x), strict=True):
        assert_same(found, expected, "bitwise")
    rows = 2 * TOKENS * 4
    kept = saved_bytes(lambda: lean(x), lean.parameters())
    assert kept == rows * (HIDDEN + 2 * WIDTH)
    assert saved_bytes(lambda: plain(x), plain.parameters()) == kept + rows * WIDTH
    assert not lean.out_proj.__dict__.get("_hf_glu_hooks")


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_models_train_the_same(family):
    model: Any = FAMILIES[family].make()
    hf_glu.convert(model, FAMILIES[family].exact, check=False)
    lean = copy.deepcopy(model)
    assert hf_glu.save_memory(lean) == len(hf_glu.find_sites(lean))
    assert hf_glu.save_memory(lean) == len(hf_glu.find_sites(lean))
    hooks = [module._forward_pre_hooks for module in lean.modules()]
    assert max(sum(hook is begin for hook in each.values()) for each in hooks) == 1
    found = []
    for each in (model, lean):
        ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
        more = {"decoder_input_ids": ids} if family == "t5" else {}
        each.eval()(input_ids=ids, **more)[0].square().sum().backward()
        found.append({key: p.grad for key, p in each.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, expected in found[0].items():
        assert_same(found[1][key], expected, "bitwise")


def test_an_exception_in_the_out_projection_leaves_no_hook_behind():
    ffn = make_ffn()
    watch_out(ffn.out_proj)
    ffn.out_proj.weight = nn.Parameter(torch.randn(HIDDEN, WIDTH + 1))
    with pytest.raises(RuntimeError):
        ffn(torch.randn(2, HIDDEN, requires_grad=True))
    assert "_hf_glu_hooks" not in ffn.out_proj.__dict__
    kept = saved_bytes(lambda: (torch.randn(4, 4, requires_grad=True) * 2).exp())
    assert kept == 64  # nobody packs any more
    assert end in ffn.out_proj._forward_hooks.values()


def test_a_dense_model_has_nothing_to_save():
    with pytest.raises(NoSiteError, match="convert"):
        hf_glu.save_memory(FAMILIES["bert"].make())
