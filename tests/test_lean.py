"""What gated FFNs keep for the backward pass: the same numbers with less memory."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from comparing import assert_same
from pico import FAMILIES
from torch import nn

import hf_glu
from hf_glu.activation import registry
from hf_glu.activation.fused import find_fused, has_compiler
from hf_glu.activation.gating import Gate, product_of
from hf_glu.bench.ffn import FusedFFN
from hf_glu.bench.memory import peak_bytes, saved_bytes
from hf_glu.errors import NoSiteError, OptionError
from hf_glu.functional import gated
from hf_glu.layers.lean import begin, end, watch_out

needs_compiler = pytest.mark.skipif(not has_compiler("cpu"), reason="torch finds no C++ compiler")
NAMES = ("swiglu", "geglu", "reglu", "glu", "bilinear", "geglu_new", "relu2glu", "tanh_glu")
HIDDEN, WIDTH, TOKENS = 16, 48, 37


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 35, 2 * 33, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_lean_product_is_the_plain_one(name, dtype, monkeypatch):
    monkeypatch.setattr("hf_glu.activation.products.SIZE", 200)  # several blocks
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
    assert not lean.out_proj.__dict__.get("_hf_glu_swap")


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
    assert "_hf_glu_swap" not in ffn.out_proj.__dict__
    kept = saved_bytes(lambda: (torch.randn(4, 4, requires_grad=True) * 2).exp())
    assert kept == 64  # nobody packs any more
    assert end in ffn.out_proj._forward_hooks.values()


def test_a_dense_model_has_nothing_to_save():
    with pytest.raises(NoSiteError, match="convert"):
        hf_glu.save_memory(FAMILIES["bert"].make())


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_compiler)])
def test_save_memory_lets_the_product_go(fused):
    plain = make_ffn()
    if fused:
        hf_glu.fuse(plain)
    lean = copy.deepcopy(plain)
    watch_out(lean.out_proj)
    x = torch.randn(2, TOKENS, HIDDEN, requires_grad=True)
    for ffn in (plain, lean):
        ffn(x).sum().backward()  # imports and compiles what it needs
    gc.collect()
    gc.disable()
    try:
        kept = [peak_bytes(lambda ffn=ffn: [ffn(x) for _ in range(4)]) for ffn in (plain, lean)]
        assert kept[0] - kept[1] == 3 * 2 * TOKENS * WIDTH * 4  # the last is there until its out-projection is done
        once, often = (peak_bytes(lambda n=n: [lean(x).sum().backward() for _ in range(n)]) for n in (1, 4))
        assert often == once  # no cycle keeps anything
    finally:
        gc.enable()


def overwritten(keep: str = "", *, hidden: int = HIDDEN, dim: int = 3, bias: bool = True, graph: bool = False) -> bool:
    """Tell whether the gate's gradient is written over its input, of which something else may be kept."""
    act, in_proj, out_proj = registry["swiglu"].factory(), nn.Linear(hidden, 2 * WIDTH, bias), nn.Linear(WIDTH, hidden)
    h = in_proj(torch.randn(2, 5, hidden)[0 if dim == 2 else ...])
    address, seen, more = h.data_ptr(), [], 0.0
    h.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    if keep == "another node":
        more = h.square().sum()
    y = act(h)
    kept = {"itself": h, "a view": h[..., 1:], "the same values": h.detach(), "the product": y}.get(keep)
    loss = out_proj(y).sum() + more
    before = None if kept is None else kept.detach().clone()
    del h, y, more
    loss.backward(retain_graph=graph)
    if before is not None:
        assert_same(kept, before, "bitwise")
    return seen[0] == address


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_gradient_is_written_over_what_nobody_else_has(dim, bias):
    assert overwritten(dim=dim, bias=bias)
    assert not overwritten(dim=dim, bias=bias, graph=True)
    for keep in ("itself", "a view", "the same values", "another node", "the product"):
        assert not overwritten(keep, dim=dim, bias=bias)


def test_a_torch_that_counts_no_references_writes_nothing_over(monkeypatch):
    monkeypatch.setattr("hf_glu.activation.ownership.KNOWN", False)
    assert not overwritten()


def test_a_graph_that_is_used_twice_gives_the_same_twice():
    ffn, x = make_ffn(), torch.randn(2, TOKENS, HIDDEN, requires_grad=True)
    loss = ffn(x).square().sum()
    first = torch.autograd.grad(loss, [x, *ffn.parameters()], retain_graph=True)
    for found, expected in zip(torch.autograd.grad(loss, [x, *ffn.parameters()]), first, strict=True):
        assert_same(found, expected, "bitwise")


def test_transforms_of_torch_func_see_the_formula():
    act, x = registry["swiglu"].factory(), torch.randn(3, 8, dtype=torch.float64)
    found = torch.func.vmap(torch.func.grad(lambda row: act(row * 1).sum()))(x)
    leaf = x.clone().requires_grad_()
    gated(leaf, act.phi).sum().backward()
    torch.testing.assert_close(found, leaf.grad)


@needs_compiler
@pytest.mark.parametrize("name", ["swiglu", "geglu", "geglu_new", "reglu"])
def test_fused_gates_keep_their_values_and_their_gradients(name):
    plain = make_ffn(name)
    fused = copy.deepcopy(plain)
    assert hf_glu.fuse(fused) == hf_glu.fuse(fused) == 1
    watch_out(fused.out_proj)
    for tokens in (TOKENS, 5):  # a second size needs no other kernel
        x = torch.randn(2, tokens, HIDDEN, requires_grad=True)
        assert_same(fused(x), plain(x), "bitwise")
        for found, expected in zip(gradients(fused, x), gradients(plain, x), strict=True):
            size = expected.abs().max()
            torch.testing.assert_close(found / size, expected / size, rtol=2e-6, atol=2e-6)
    exact = torch.autograd.grad(plain.double()(x.double()).sum(), x)[0]
    size = exact.abs().max()
    (found,) = torch.autograd.grad(fused(x).sum(), x)
    torch.testing.assert_close(found / size, exact / size, rtol=2e-6, atol=2e-6, check_dtype=False)


@needs_compiler
def test_fused_gradients_are_written_over_what_nobody_else_has(monkeypatch):
    made = registry["swiglu"].factory

    def factory(*args: Any) -> Any:
        act = made(*args)
        act.fused = partial(find_fused, "silu")
        return act

    monkeypatch.setitem(registry._entries, "swiglu", replace(registry["swiglu"], factory=factory))
    assert overwritten()
    assert not overwritten("the same values")


def test_fuse_refuses_what_has_no_gates_and_no_compiler(monkeypatch):
    with pytest.raises(NoSiteError, match="convert"):
        hf_glu.fuse(FAMILIES["bert"].make())
    find_fused.cache_clear()
    monkeypatch.setattr("hf_glu.activation.fused.has_compiler", lambda device: False)
    ffn = make_ffn()
    with pytest.raises(OptionError, match="compiler"):
        hf_glu.fuse(ffn)
    find_fused.cache_clear()
    assert not ffn.act.fused


def test_fused_models_can_be_saved_copied_and_traced(tmp_path):
    ffn = make_ffn()
    ffn.act.fused = partial(find_fused, "silu")
    x = torch.randn(2, HIDDEN)
    torch.save(ffn, tmp_path / "ffn.pt")
    loaded = torch.load(tmp_path / "ffn.pt", weights_only=False)
    assert loaded.act.fused.args == ("silu",)
    assert_same(loaded(x), ffn(x), "bitwise")
    assert_same(copy.deepcopy(ffn)(x), ffn(x), "bitwise")
    assert not any("fused" in key for key in ffn.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_model_has_the_formula(fused):
    ffn, x = make_ffn(), torch.randn(2, TOKENS, HIDDEN, requires_grad=True)
    ffn.act.fused = partial(find_fused, "silu") if fused else None
    compiled = torch.compile(ffn, backend="eager", fullgraph=True)
    assert_same(compiled(x), ffn(x), "exact")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["swiglu", "geglu_new", "geglu"])
def test_fused_gates_on_a_gpu(name):
    plain = make_ffn(name).cuda()
    fused = copy.deepcopy(plain)
    hf_glu.fuse(fused)
    x = torch.randn(2, TOKENS, HIDDEN, device="cuda", requires_grad=True)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    for found, expected in zip(gradients(fused, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_ligers_kernels_in_the_interpreter():
    pytest.importorskip("liger_kernel")
    code = """
import torch
from hf_glu.activation.fused import liger_silu
from hf_glu.functional import gated
fused, x = liger_silu(), torch.randn(3, 5, 128, requires_grad=True)
y, d = gated(x, torch.nn.functional.silu), torch.randn(3, 5, 64)
(expected,) = torch.autograd.grad(y, x, d)
torch.testing.assert_close(fused.value(x.detach()), y.detach())
found = x.detach().clone()
fused.gradient(found, d)
torch.testing.assert_close(found, expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
