"""Kernels of mixes and modulated gates: the formulas' values and gradients, and no kernel where there must be none."""

from __future__ import annotations

import copy

import pytest
import torch
from pico import FAMILIES, VOCAB
from torch import nn
from torch.utils.checkpoint import checkpoint

import hf_glu
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.activation.kernels import mixture, modulation
from hf_glu.activation.kernels.compiled import has_compiler
from hf_glu.activation.kernels.mixture import mix, recomputed_mix
from hf_glu.activation.kernels.modulation import fused_modulation, modulate
from hf_glu.errors import OptionError

pytestmark = pytest.mark.slow  # kernels are made
needs_compiler = pytest.mark.skipif(not has_compiler("cpu"), reason="torch finds no C++ compiler")
FUNCTIONS = ("silu", "gelu", "relu", "tanh", "relu2")
KINDS = ("learnable_geglu", "moa_swiglu", "modulated_geglu", "modulated_swiglu")
N, W, K = 19, 24, len(FUNCTIONS)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}


def fused_mix(functions, *tensors):
    return recomputed_mix(functions, *tensors, fused=True)


def formula_inputs(dtype: torch.dtype, channel: bool, row: bool) -> list[torch.Tensor | None]:
    x = torch.randn(N, 2 * W).to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    return [
        x,
        torch.randn(K, W, dtype=wide, requires_grad=True) if channel else None,
        torch.randn(N, K, dtype=wide, requires_grad=True) if row else None,
    ]


def value_and_gradients(function, tensors) -> list[torch.Tensor]:
    given = [tensor for tensor in tensors if tensor is not None]
    y = function(*tensors)
    d = torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype)
    return [y, *torch.autograd.grad(y, given, d)]


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("channel", "row"), [(True, False), (False, True), (True, True)])
def test_a_kernel_of_a_mix_is_the_formula(dtype, channel, row):
    torch.manual_seed(0)
    functions = [build_elementwise(name) for name in FUNCTIONS]
    x, *coefficients = formula_inputs(dtype, channel, row)

    def of(combine):
        return lambda x, *given: combine(functions, x.chunk(2, -1)[0], *given)  # a view, as of a gate

    found = value_and_gradients(of(fused_mix), [x, *coefficients])
    double = [None if each is None else each.detach().double().requires_grad_() for each in (x, *coefficients)]
    expected = value_and_gradients(of(mix), double)
    for one, other in zip(found, expected, strict=True):
        size = other.abs().max()
        torch.testing.assert_close(one.double() / size, other / size, rtol=0, atol=TOLERANCE[dtype])


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_kernel_of_a_modulated_function_is_the_formula(dtype):
    torch.manual_seed(0)
    phi, shapes = build_elementwise("gelu"), ((N, W), (N, 5), (W, 5), (W, 5))
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    found = value_and_gradients(lambda *given: fused_modulation(phi, *given), tensors)
    double = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = value_and_gradients(lambda *given: phi(modulate(*given)), double)
    for one, other in zip(found, expected, strict=True):
        size = other.abs().max()
        torch.testing.assert_close(one.double() / size, other / size, rtol=0, atol=TOLERANCE[dtype])


def trained_gradients(model: nn.Module, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).logits.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@needs_compiler
@pytest.mark.parametrize(("checkpointing", "experts"), [(False, None), (True, None), (False, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_model_trains_as_before(kind, checkpointing, experts):
    torch.manual_seed(0)
    plain = FAMILIES["bert"].make(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    hf_glu.convert(plain, kind, experts=experts, check=False)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    fused = copy.deepcopy(plain)
    assert hf_glu.fuse(fused) > 0
    if checkpointing:
        for model in (plain, fused):
            model.train()  # dropout is 0 in the little models
            model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = {"input_ids": torch.randint(3, VOCAB, (3, 9))}
    with torch.no_grad():
        torch.testing.assert_close(fused(**inputs).logits, plain(**inputs).logits)
    found, expected = (trained_gradients(model, inputs) for model in (fused, plain))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        size = gradient.abs().max().clamp_min(1e-4)
        torch.testing.assert_close(found[name] / size, gradient / size, rtol=0, atol=2e-4, msg=name)


@needs_compiler
def test_a_kernel_is_shared_by_all_layers_and_sizes():
    mixture._compiled_mix.cache_clear()
    functions = [[build_elementwise(name) for name in ("silu", "tanh")] for _ in range(12)]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=3):
        for layer, size in zip(functions, range(3, 15), strict=True):
            x, row = torch.randn(size, 2 * size, requires_grad=True), torch.randn(size, 2, requires_grad=True)
            torch.testing.assert_close(fused_mix(layer, x, None, row), mix(layer, x, None, row))
    assert mixture._compiled_mix.cache_info().currsize == 1


@needs_compiler
def test_kept_tensors_pass_through_hooks_of_torch():
    functions, x = [build_elementwise(name) for name in ("silu", "gelu")], torch.randn(N, W, requires_grad=True)
    row = torch.randn(N, 2, requires_grad=True)

    def of(x, row):
        return fused_mix(functions, x, None, row).square().sum()

    plain = torch.autograd.grad(mix(functions, x, None, row).square().sum(), (x, row))
    with torch.autograd.graph.save_on_cpu():
        offloaded = torch.autograd.grad(of(x, row), (x, row))
    again = torch.autograd.grad(checkpoint(of, x, row, use_reentrant=False), (x, row))
    for found in (offloaded, again):
        torch.testing.assert_close(found, plain)
    loss = of(x, row)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, row), retain_graph=True), plain)  # and once more
    torch.testing.assert_close(torch.autograd.grad(loss, (x, row)), plain)


@needs_compiler
def test_second_derivatives_are_the_formulas():
    functions = [build_elementwise(name) for name in ("silu", "gelu")]
    x, row = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (3, 2)))
    assert torch.autograd.gradgradcheck(lambda *given: fused_mix(functions, given[0], None, given[1]), (x, row))
    shapes = ((3, 4), (3, 2), (4, 2), (4, 2))
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradgradcheck(lambda *given: fused_modulation(functions[1], *given), tensors)


def test_functions_of_ones_own_and_transforms_have_the_formula(monkeypatch):
    monkeypatch.setattr(mixture, "_compiled_mix", None)  # would raise where it is asked
    monkeypatch.setattr(modulation, "_compiled_modulation", None)
    functions, x = [build_elementwise("silu"), nn.LeakyReLU(0.3)], torch.randn(N, W, requires_grad=True)
    channel, vector, threshold = torch.randn(2, W), torch.randn(N, 3), torch.randn(W, 3)
    torch.testing.assert_close(fused_mix(functions, x, channel, None), mix(functions, x, channel, None))
    found = fused_modulation(functions[1], x, vector, threshold, threshold)
    torch.testing.assert_close(found, functions[1](modulate(x, vector, threshold, threshold)))
    plain = [build_elementwise("silu"), build_elementwise("gelu")]
    monkeypatch.undo()
    torch.func.vmap(lambda row: fused_mix(plain, row.unsqueeze(0), channel, None))(x)


def test_a_mix_without_a_compiler_is_refused(monkeypatch):
    model = FAMILIES["bert"].make()
    hf_glu.convert(model, "learnable_geglu", check=False)
    for place in ("ffn.lean", "activation.kernels.compiled"):
        monkeypatch.setattr(f"hf_glu.{place}.has_compiler", lambda device: False)
    with pytest.raises(OptionError, match="compiler"):
        hf_glu.fuse(model)
    assert not any(getattr(module, "is_fused", False) for module in model.modules())
