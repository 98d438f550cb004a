"""What gated FFNs keep for the backward pass, and that nothing which is kept or shared is ever written over."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from comparing import assert_same
from pico import FAMILIES
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN

import hf_glu
from hf_glu.activation import registry
from hf_glu.activation.kernels.compiled import has_compiler
from hf_glu.activation.kernels.formulas import gated
from hf_glu.activation.kernels.fused import _kernels, find_fused
from hf_glu.activation.kernels.product import RecomputedGate, fingerprint, product_of
from hf_glu.activation.module import OwnedActivation
from hf_glu.activation.wrapped import Shift
from hf_glu.bench.ffn import FusedFFN
from hf_glu.bench.memory import peak_bytes, saved_bytes
from hf_glu.errors import NoSiteError, OptionError
from hf_glu.ffn.lean import LeanOut, keep_less

needs_compiler = pytest.mark.skipif(not has_compiler("cpu"), reason="torch finds no C++ compiler")
NAMES = ("swiglu", "geglu", "reglu", "glu", "bilinear", "geglu_new", "relu2glu", "tanh_glu")
HIDDEN, WIDTH, TOKENS = 16, 48, 37


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 35, 2 * 33, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def make_act(name: str, *, saves: bool = True) -> Any:
    act = registry[name].factory()
    if saves:
        keep_less(act, None)
    return act


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_recomputed_product_is_the_plain_one(name, dtype):
    act, x = make_act(name), inputs(dtype)
    lean, plain = act(x), gated(x, act.phi, contiguous=act.contiguous)
    assert product_of(lean) is not None
    assert_same(lean, plain, "bitwise")
    gradient = torch.randn_like(plain)
    found, expected = (torch.autograd.grad(y, x, gradient)[0] for y in (lean, plain))
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_only_an_out_projection_that_asks_pays_for_the_fingerprint():
    act, x = make_act("swiglu", saves=False), inputs(torch.float32)
    act.is_fused = True
    assert product_of(act(x)) is None
    keep_less(act, None)
    assert product_of(act(x)) is not None


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_every_kind(name, saves):
    act = make_act(name, saves=saves)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(act, (x,), check_batched_grad=True, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(act, (x,), check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize("saves", [False, True])
def test_transforms_of_torch_func_and_vectorized_jacobians(saves):
    act, weight = make_act("geglu", saves=saves), torch.randn(8, 3, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64)

    def of_weight(weight: torch.Tensor) -> torch.Tensor:
        return act(x @ weight.T)

    jacobian = torch.autograd.functional.jacobian
    expected = jacobian(of_weight, weight)
    torch.testing.assert_close(jacobian(of_weight, weight, vectorize=True), expected)
    torch.testing.assert_close(torch.func.jacrev(of_weight)(weight), expected)
    torch.testing.assert_close(torch.func.jacfwd(of_weight)(weight), expected)
    rows = torch.func.vmap(torch.func.grad(lambda row: act(weight @ row).sum()))(x)
    leaf = x.clone().requires_grad_()
    act(leaf @ weight.T).sum().backward()
    torch.testing.assert_close(rows, leaf.grad)


def test_the_formula_is_the_default_and_recomputing_needs_a_known_function(monkeypatch):
    calls = []
    plain = RecomputedGate.apply
    monkeypatch.setattr(RecomputedGate, "apply", lambda *args: calls.append(1) or plain(*args))
    make_act("swiglu", saves=False)(inputs())
    make_act("swiglu")(inputs().detach())
    make_act("prelu_glu")(inputs())
    with torch.no_grad():
        make_act("swiglu")(inputs())
    assert not calls
    make_act("swiglu")(inputs())
    assert len(calls) == 1


class Twice(nn.Module):
    """An elementwise module of a user's, with an attribute that Transformers' GELU has, too."""

    def __init__(self) -> None:
        super().__init__()
        self.act = functional.gelu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.act(x)


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rrelu(x, 0.1, 0.9, training=True)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Buffer(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return functional.silu(x)


@pytest.fixture
def users(monkeypatch):
    for name, made in {"twice_gelu": Twice, "random": Random, "counting": Counting}.items():
        monkeypatch.setitem(ACT2FN, name, made)


@pytest.mark.parametrize("prefix", ["", "learnable_"])
def test_modules_of_users_are_called_as_they_are(users, prefix):
    x = torch.randn(2, 8)
    for name in ("twice_gelu", "counting"):
        act, plain = make_act(f"{prefix}{name}_glu"), {"twice_gelu": Twice, "counting": Counting}[name]()
        leaf = x.clone().requires_grad_()
        y = act(leaf)
        expected = gated(leaf, plain)
        torch.testing.assert_close(y, expected)
        found, wanted = (torch.autograd.grad(each.sum(), leaf)[0] for each in (y, expected))
        torch.testing.assert_close(found, wanted)
    counted = next(module for module in act.modules() if isinstance(module, Counting))
    assert counted.calls == 1
    act, leaf = make_act(f"{prefix}random_glu"), -torch.rand(1, 8)
    leaf = torch.cat([leaf[:, :4], torch.ones(1, 4)], 1).requires_grad_()
    y = act(leaf)
    (found,) = torch.autograd.grad(y.sum(), leaf)
    torch.testing.assert_close(found[:, :4], (y / leaf[:, :4]).detach())


@pytest.mark.parametrize("change", ["hook", "forward", "function"])
def test_known_functions_that_someone_has_changed_are_called_as_they_are(change):
    act = make_act("geglu")
    if change == "hook":
        act.phi.register_forward_hook(lambda module, args, y: 3 * y)
    elif change == "forward":
        act.phi.forward = lambda x: 3 * functional.gelu(x)
    else:
        act.phi.act = lambda x: 3 * functional.gelu(x)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(act, (x,))
    torch.testing.assert_close(act(x), 3 * gated(x, functional.gelu))


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
    keep_less(lean.act, lean.out_proj)
    x = torch.randn(2, TOKENS, HIDDEN, requires_grad=True)
    for found, expected in zip(gradients(lean, x), gradients(plain, x), strict=True):
        size = expected.abs().max()
        torch.testing.assert_close(found / size, expected / size, rtol=2e-6, atol=2e-6)
    rows = 2 * TOKENS * 4
    kept = saved_bytes(lambda: lean(x), lean.parameters())
    assert kept == rows * (HIDDEN + 2 * WIDTH)
    assert saved_bytes(lambda: plain(x), plain.parameters()) >= kept + 2 * rows * WIDTH


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_models_train_the_same(family):
    model: Any = FAMILIES[family].make()
    hf_glu.convert(model, FAMILIES[family].exact, check=False)
    lean = copy.deepcopy(model)
    assert hf_glu.save_memory(lean) == len(hf_glu.find_sites(lean))
    assert hf_glu.save_memory(lean) == len(hf_glu.find_sites(lean))
    assert sum(isinstance(module, LeanOut) for module in lean.modules()) == len(hf_glu.find_sites(lean))
    found = []
    for each in (model, lean):
        ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
        more = {"decoder_input_ids": ids} if family == "t5" else {}
        each.eval()(input_ids=ids, **more)[0].square().sum().backward()
        found.append({key: p.grad for key, p in each.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, expected in found[0].items():
        assert_same(found[1][key], expected, "exact")


def test_an_exception_in_the_out_projection_leaves_nothing_behind():
    ffn = make_ffn()
    keep_less(ffn.act, ffn.out_proj)
    ffn.out_proj.weight = nn.Parameter(torch.randn(HIDDEN, WIDTH + 1))
    with pytest.raises(RuntimeError):
        ffn(torch.randn(2, HIDDEN, requires_grad=True))
    kept = saved_bytes(lambda: (torch.randn(4, 4, requires_grad=True) * 2).exp())
    assert kept == 64  # nobody packs any more


WRITERS = {
    "in place": lambda y: y.mul_(0.5),
    "data": lambda y: (y.data.mul_(0.5), None)[1],
    "numpy": lambda y: np.multiply(y.detach().numpy(), 0.5, out=y.detach().numpy()),
    "another": lambda y: y * 0.5,
    "dropout": lambda y: functional.dropout(y, 0.5, training=True, inplace=True),
    "swapped units": lambda y: (y.data.copy_(y.data.flip(-1)), None)[1],
    "swapped tokens": lambda y: (y.data.copy_(y.data.roll(1, -2)), None)[1],
    "a unit": lambda y: (y.data[..., :1].zero_(), None)[1],
}


@pytest.mark.parametrize("where", ["activation", "out_proj"])
@pytest.mark.parametrize("way", WRITERS)
def test_whatever_happens_between_gate_and_out_projection_is_seen(way, where):
    plain = make_ffn()
    lean = copy.deepcopy(plain)
    keep_less(lean.act, lean.out_proj)
    x, found = torch.randn(2, TOKENS, HIDDEN, requires_grad=True), []

    def write(y: Any) -> Any:
        torch.manual_seed(1)
        changed = WRITERS[way](y)
        return changed if isinstance(changed, torch.Tensor) and changed.shape == y.shape else None

    def after(module: nn.Module, args: Any, y: torch.Tensor) -> Any:
        return write(y)

    def before(module: nn.Module, args: Any) -> Any:
        return write(args[0])

    for ffn in (plain, lean):
        if where == "activation":
            ffn.act.register_forward_hook(after)
        else:
            ffn.out_proj.register_forward_pre_hook(before)
        found.append(gradients(ffn, x))
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (2, 37, 48), (40, 1024)])
def test_the_fingerprint_sees_each_change_and_each_swap(dtype, shape):
    y = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype) + 1  # which differ in few bits
    first, count = fingerprint(y), y.numel()
    assert torch.equal(fingerprint(y.clone()), first)
    for seed in range(60):
        one, two = torch.randint(count, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
        swapped, changed = y.clone(), y.clone()
        swapped.view(-1)[one], swapped.view(-1)[two] = y.view(-1)[two], y.view(-1)[one]
        changed.view(-1)[one] += 1
        assert torch.equal(fingerprint(swapped), first) == torch.equal(swapped, y)
        assert not torch.equal(fingerprint(changed), first)


def test_a_dense_model_has_nothing_to_save():
    with pytest.raises(NoSiteError, match="convert"):
        hf_glu.save_memory(FAMILIES["bert"].make())


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_compiler)])
def test_save_memory_lets_the_product_go(fused):
    plain = make_ffn()
    if fused:
        hf_glu.fuse(plain)
    lean = copy.deepcopy(plain)
    keep_less(lean.act, lean.out_proj)
    x = torch.randn(2, TOKENS, HIDDEN, requires_grad=True)
    for ffn in (plain, lean):
        ffn(x).sum().backward()  # imports and compiles what it needs
    gc.collect()
    gc.disable()
    try:
        kept = [peak_bytes(lambda ffn=ffn: [ffn(x) for _ in range(4)]) for ffn in (plain, lean)]
        assert kept[0] - kept[1] >= 3 * 2 * TOKENS * WIDTH * 4  # the last is there until its out-projection is done
        once, often = (peak_bytes(lambda n=n: [lean(x).sum().backward() for _ in range(n)]) for n in (1, 4))
        assert often == once  # no cycle keeps anything
    finally:
        gc.enable()


class Keeping(TorchDispatchMode):
    """Keeps what each operation gives, and a copy of it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.kept.append((out, out.clone()))
        return out


class OfNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.y = np.tanh(x.detach().numpy())
        return torch.from_numpy(ctx.y)

    @staticmethod
    def backward(ctx, d):
        return d * torch.from_numpy(1 - ctx.y**2)


def ways_to_share(act: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradient of x by situations in which others see the memory of the pre-activations."""
    found, store = {}, {}

    def pack(tensor: torch.Tensor) -> Any:
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        store.setdefault(key, (tensor, tensor.detach().clone()))  # kept, so that no other lies there
        return key

    def run(name: str, loss: torch.Tensor) -> None:
        (found[name],) = torch.autograd.grad(loss, x)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda key: store[key][1]):
        h = x * 1
        loss = act(h).square().sum() + h.sin().sum()
        del h
        run("one copy of each", loss)
    run("numpy", act(OfNumpy.apply(x * 1)).square().sum())
    h = x * 1
    storage, before = h.untyped_storage(), h.detach().clone()
    loss = act(h).square().sum()
    del h
    run("storage", loss)
    assert_same(torch.empty(0, dtype=x.dtype).set_(storage, 0, before.shape), before, "bitwise")
    mode = Keeping()
    with mode:
        run("dispatch mode", act(x * 1).square().sum())
    assert all(torch.equal(kept, copied) for kept, copied in mode.kept[:2])
    return found


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("name", ["swiglu", "geglu", "learnable_silu", "moa_silu"])
def test_memory_that_others_see_is_left_alone(name, saves):
    act = make_act(name, saves=saves)
    torch.manual_seed(0)
    x = torch.randn(5, 16, requires_grad=True)
    plain = ways_to_share(copy.deepcopy(act), x)
    (expected,) = torch.autograd.grad(act(x * 1).square().sum(), x)
    leaf = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(copy.deepcopy(act).double()(leaf).square().sum(), leaf)
    torch.testing.assert_close(expected.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain["storage"], expected)
    torch.testing.assert_close(plain["dispatch mode"], expected)
    torch.testing.assert_close(plain["one copy of each"], expected + x.detach().cos())
    y = torch.tanh(x)
    (of_tanh,) = torch.autograd.grad(act(y).square().sum(), x)
    torch.testing.assert_close(plain["numpy"], of_tanh)


def test_a_graph_that_is_used_twice_gives_the_same_twice():
    ffn, x = make_ffn(), torch.randn(2, TOKENS, HIDDEN, requires_grad=True)
    loss = ffn(x).square().sum()
    first = torch.autograd.grad(loss, [x, *ffn.parameters()], retain_graph=True)
    for found, expected in zip(torch.autograd.grad(loss, [x, *ffn.parameters()]), first, strict=True):
        assert_same(found, expected, "bitwise")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["swiglu", "geglu", "geglu_new", "reglu"])
def test_fused_gates_keep_their_values_and_their_gradients(name):
    plain = make_ffn(name)
    fused = copy.deepcopy(plain)
    assert hf_glu.fuse(fused) == hf_glu.fuse(fused) == 1
    keep_less(fused.act, fused.out_proj)
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


@pytest.mark.slow
@needs_compiler
def test_fused_gates_leave_memory_alone_and_see_what_was_changed():
    act = make_act("swiglu", saves=False)
    act.is_fused = True
    x = torch.randn(5, 16, requires_grad=True)
    found, (expected,) = ways_to_share(act, x), torch.autograd.grad(act(x * 1).square().sum(), x)
    torch.testing.assert_close(found["storage"], expected)
    torch.testing.assert_close(found["dispatch mode"], expected)
    act.phi = nn.LeakyReLU(0.3)  # not the slope that its class has by default
    (found,) = torch.autograd.grad(act(x).sum(), x)
    (expected,) = torch.autograd.grad(gated(x, act.phi).sum(), x)
    torch.testing.assert_close(found, expected)
    assert find_fused(act.phi, "cpu") is None


def test_fuse_refuses_what_has_no_gates_and_no_compiler(monkeypatch):
    with pytest.raises(NoSiteError, match="convert"):
        hf_glu.fuse(FAMILIES["bert"].make())
    _kernels.cache_clear()
    for place in ("activation.kernels.fused", "ffn.lean"):
        monkeypatch.setattr(f"hf_glu.{place}.has_compiler", lambda device: False)
    ffn = make_ffn()
    with pytest.raises(OptionError, match="compiler"):
        hf_glu.fuse(ffn)
    _kernels.cache_clear()
    assert not ffn.act.is_fused


def test_fused_models_can_be_saved_copied_and_traced(tmp_path):
    ffn = make_ffn()
    ffn.act.is_fused = True
    x = torch.randn(2, HIDDEN)
    torch.save(ffn, tmp_path / "ffn.pt")
    loaded = torch.load(tmp_path / "ffn.pt", weights_only=False)
    assert loaded.act.is_fused
    assert_same(loaded(x), ffn(x), "bitwise")
    assert_same(copy.deepcopy(ffn)(x), ffn(x), "bitwise")
    assert not any("fused" in key for key in ffn.state_dict())


def test_hooks_of_a_shift_run_in_a_fused_gate(monkeypatch):
    gate, x = make_ffn("modulated_swiglu").act, torch.randn(2, 5, 2 * WIDTH)
    shifts = [module for module in gate.modules() if isinstance(module, Shift)]
    calls: list[Any] = []
    for module in gate.modules():
        if isinstance(module, OwnedActivation):
            module.is_fused = True
    for shift in shifts:
        monkeypatch.setattr(type(shift), "then", lambda self, phi, gate: torch.zeros_like(gate))
        assert not gate(x).any()
        shift.register_forward_hook(lambda *args: calls.append(args))
    assert gate(x).any()
    assert len(calls) == len(shifts) > 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_model_has_the_formula(fused):
    ffn, x = make_ffn(), torch.randn(2, TOKENS, HIDDEN, requires_grad=True)
    ffn.act.is_fused = fused
    compiled = torch.compile(ffn, backend="eager", fullgraph=True)
    assert_same(compiled(x), ffn(x), "exact")


@pytest.mark.gpu
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


@pytest.mark.gpu
def test_ligers_kernels_in_the_interpreter():
    pytest.importorskip("liger_kernel")
    code = """
import torch
from hf_glu.activation.kernels.fused import liger_silu
from hf_glu.activation.kernels.formulas import gated
fused, x = liger_silu(), torch.randn(3, 5, 128, requires_grad=True)
y, d = gated(x, torch.nn.functional.silu), torch.randn(3, 5, 64)
(expected,) = torch.autograd.grad(y, x, d)
torch.testing.assert_close(fused.value(x.detach()), y.detach())
found = torch.empty_like(x)
fused.gradient(x.detach(), d, found)
torch.testing.assert_close(found, expected)
"""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
