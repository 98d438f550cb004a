"""Mixtures of activations: exact at first, alive, any dictionary, annealed and folded, and their own gradient."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_same, outputs
from covering import covering
from pico import FAMILIES, make_native
from torch.autograd import gradcheck, gradgradcheck
from transformers.activations import ACT2FN

import hf_glu
from hf_glu import cli
from hf_glu.activation.context import Reading
from hf_glu.activation.context.passes import Pass, within
from hf_glu.activation.kernels import modulation as modulating
from hf_glu.activation.kernels.blocks import SIZE
from hf_glu.activation.kernels.mixture import mix, recomputed_mix
from hf_glu.activation.learnable import mixes
from hf_glu.activation.moa import TokenMix
from hf_glu.config.glu import GluConfig
from hf_glu.errors import ConversionError, OptionError, UnknownNameError
from hf_glu.ffn.lean import keep_less

FUNCTIONS = ("silu", "relu", "gelu", "tanh", "sigmoid", "gelu_new", "linear", "relu2")
COUNT = len(FUNCTIONS)


def awake(model, share=0.3):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in mixes(model):
            for parameter in each.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=share)
    return model


def reloaded(model, folder):
    model.save_pretrained(folder)
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return again


@pytest.mark.parametrize(
    ("family", "options"),
    covering(FAMILIES, [None, {"gate": "linear"}, {"rank": 2}, {"per": "channel", "rank": 3}]),
)
def test_conversion_is_exact_and_alive(family, options, tmp_path):
    model = FAMILIES[family].make()
    before = outputs(model)
    report = hf_glu.convert(model, "moa_swiglu", mix=options)
    assert report.plan.promise == "exact"
    assert_same(outputs(model), before, "exact")
    assert report.plan.parameters_after == model.num_parameters()
    names = mixes(model)[0].names
    assert names[0] == FAMILIES[family].dense
    assert set(names) >= {"silu", "gelu", "relu", "tanh"}
    new = {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in ("mix", "choice", "features")}
    assert len(new) == len(mixes(model)) * (3 if options and "rank" in options else 2)
    first = {name: parameter.detach().clone() for name, parameter in new.items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**hf_glu.instruments.probe.probe_inputs(model))[0].float().square().mean().backward()
        optimizer.step()
    for name, parameter in new.items():
        assert (parameter != first[name]).float().mean() > 0.6, name
    assert_same(outputs(reloaded(model, tmp_path)), outputs(model), "bitwise")


@pytest.mark.parametrize("prefix", ["stateful_", "modulated_", "modulated_stateful_"])
@pytest.mark.parametrize("kind", ["moa_", "learnable_"])
def test_under_wrappers_annealed_and_folded(prefix, kind, tmp_path):
    model = FAMILIES["gpt2"].make()
    before = outputs(model)
    hf_glu.convert(model, f"{prefix}{kind}swiglu")
    assert_same(outputs(model), before, "exact up to rounding")
    for name, parameter in awake(model).named_parameters():
        if ".shift." in name and not name.endswith("decay"):
            parameter.data.normal_()
    hf_glu.anneal(model, 1.0)
    pure = outputs(model)
    hf_glu.freeze_mix(model)
    assert not mixes(model)
    assert model.config.activation_function == f"{prefix}swiglu"
    assert_same(outputs(model), pure, "exact up to rounding")
    assert_same(outputs(reloaded(model, tmp_path)), outputs(model), "bitwise")


@pytest.mark.parametrize("options", [{}, {"gate": "linear", "per": "channel"}])
def test_annealed_and_folded(options, tmp_path):
    model = awake(hf_glu_converted("bert", mix=options))
    assert_same(outputs(reloaded(model, tmp_path / "mixed")), outputs(model), "bitwise")
    hf_glu.anneal(model, 0.2)
    with pytest.raises(ConversionError, match="40%"):
        hf_glu.freeze_mix(model)
    hf_glu.anneal(model, 1.0)
    pure = outputs(model)
    hf_glu.freeze_mix(model)
    assert_same(outputs(model), pure, "exact")
    assert model.config.hidden_act == "swiglu"
    assert "mix" not in model.config.hf_glu


def hf_glu_converted(family, target="moa_swiglu", **more):
    model = FAMILIES[family].make()
    hf_glu.convert(model, target, check=False, **more)
    return model


def test_a_mix_that_only_starts_at_its_target_isnt_pure_once_tokens_differ():
    model = make_native("llama")
    hf_glu.convert(model, "moa_swiglu(relu)")
    mixes(model)[0].choice.data.normal_()
    with pytest.raises(ConversionError, match="0%"):
        hf_glu.freeze_mix(model)


def test_native_families_and_their_banks(tmp_path):
    for name, more in (
        ("llama", {"target": "moa_reglu"}),
        ("phi3", {"target": "moa_swiglu"}),
        ("mixtral", {"experts": "moa_silu*2"}),
    ):
        model = make_native(name)
        before = outputs(model)
        assert hf_glu.convert(model, **more).plan.promise == "exact"
        assert_same(outputs(model), before, "exact up to rounding")
        assert all(isinstance(each, TokenMix) and each.choice is not None for each in mixes(model))
        assert mixes(model)[0].names[0] == "silu"
        assert_same(outputs(reloaded(awake(model), tmp_path / name)), outputs(model), "bitwise")


def test_experts(tmp_path):
    model = FAMILIES["gpt2"].make()
    before = outputs(model)
    hf_glu.convert(model, "swiglu", experts="moa_swiglu*2,gelu_new*2")
    assert_same(outputs(model), before, "exact up to rounding")
    assert_same(outputs(reloaded(awake(model), tmp_path)), outputs(model), "bitwise")
    hf_glu.anneal(model, 1.0)
    pure = outputs(model)
    hf_glu.freeze_mix(model)
    assert_same(outputs(model), pure, "exact up to rounding")
    assert model.config.hf_glu["experts"]["groups"] == "swiglu*2,gelu_new*2"
    model = FAMILIES["gpt2"].make()
    hf_glu.convert(model, "moa_swiglu(relu)", experts=2, mix={"gate": "linear"})
    assert mixes(model)[0].names == ("gelu_new", "relu", "silu")
    assert mixes(model)[0].kind == "linear"


def test_dictionaries(tmp_path, capsys):
    model = FAMILIES["gpt2"].make()
    before = outputs(model)
    report = hf_glu.convert(model, "moa_swiglu(relu, tanh)", mix={"rank": 2})
    assert report.plan.target == model.config.activation_function == "moa_swiglu"
    assert model.config.hf_glu["mix"] == {"rank": 2, "functions": ["gelu_new", "relu", "tanh", "silu"]}
    assert_same(outputs(model), before, "exact")
    assert mixes(hf_glu_converted("gpt2", "learnable_swiglu(relu)"))[0].names == ("gelu_new", "relu", "silu")
    layers = hf_glu_converted("gpt2", {"0": "moa_swiglu(relu)", "1": "geglu_new"})
    assert [each.names for each in mixes(layers)] == [("gelu_new", "relu", "silu")]
    FAMILIES["gpt2"].make().save_pretrained(tmp_path / "dense")
    done = cli.run(["convert", str(tmp_path / "dense"), str(tmp_path / "moa"), "--to", "moa_swiglu(relu,tanh)"])
    assert done == 0, capsys.readouterr()
    again = type(model).from_pretrained(tmp_path / "moa")
    assert mixes(again)[0].names == ("gelu_new", "relu", "tanh", "silu")
    assert_same(outputs(again), before, "exact")


def test_a_dense_checkpoint_loads_with_the_name(tmp_path):
    dense = FAMILIES["bert"].make()
    dense.save_pretrained(tmp_path)
    options = {"mix": {"functions": ["relu", "tanh"], "gate": "linear", "rank": 2}}
    model = type(dense).from_pretrained(tmp_path, hidden_act="moa_swiglu", hf_glu=options)
    assert mixes(model)[0].names == ("gelu", "relu", "tanh", "silu")
    assert mixes(model)[0].kind == "linear"
    assert mixes(model)[0].features.any()
    assert_same(outputs(model), outputs(dense), "exact")


def test_revert_is_refused_once_a_mix_has_an_effect():
    model = hf_glu_converted("bert", "moa_geglu")
    torch.nn.init.normal_(mixes(model)[0].choice)
    before = outputs(model)
    with pytest.raises(ConversionError, match="moa_geglu"):
        hf_glu.revert(model)
    assert_same(outputs(model), before, "bitwise")


@pytest.mark.parametrize(
    ("target", "options", "error", "says"),
    [
        ("moa_swigul", None, UnknownNameError, "swiglu"),
        ("moa_swiglu(silu,relo)", None, UnknownNameError, "relu"),
        ("moa_swiglu(silu", None, OptionError, "can't be read"),
        ("moa_swiglu()", None, OptionError, "can't be read"),
        ("swiglu(silu,relu)", None, OptionError, "moa_"),
        ({"0": "moa_swiglu(relu)", "1": "moa_geglu(tanh)"}, None, OptionError, "one dictionary"),
        ("swiglu", {"rank": 2}, OptionError, "learnable"),
        ("learnable_swiglu", {"rank": 2}, OptionError, "mix rank is for moa_swiglu"),
        ("moa_swiglu", {"gate": "softmx"}, OptionError, "'softmax' or 'linear', got 'softmx'"),
        ("moa_swiglu", {"rank": 0}, OptionError, "rank"),
        ("moa_swiglu", {"ranks": 2}, UnknownNameError, "did you mean 'rank'"),
        ("moa_learnable_swiglu", None, UnknownNameError, "unknown"),
    ],
)
def test_bad_input(target, options, error, says):
    with pytest.raises(error, match=says):
        hf_glu.convert(FAMILIES["gpt2"].make(), target, mix=options)


def arguments(dtype, rows=70, width=6, count=COUNT):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, width), (count, width), (rows, count))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def built():
    return [ACT2FN[name] for name in FUNCTIONS]


@pytest.mark.parametrize("kept", ["both", "channel", "row"])
def test_gradcheck(kept, monkeypatch):
    monkeypatch.setattr("hf_glu.activation.kernels.blocks.SIZE", 12)
    x, channel, row = (tensor.requires_grad_() for tensor in arguments(torch.float64, 5))
    given = (x, None if kept == "row" else channel, None if kept == "channel" else row)
    for function in (mix, recomputed_mix):
        assert gradcheck(
            lambda *tensors, way=function: way(built(), *tensors), given, check_batched_grad=True, fast_mode=True
        )
        assert gradgradcheck(
            lambda *tensors, way=function: way(built(), *tensors), given, check_batched_grad=True, fast_mode=True
        )


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize(
    "name", ["moa_gelu", "moa_swiglu", "learnable_geglu", "stateful_moa_swiglu", "modulated_moa_relu"]
)
def test_second_derivatives_where_the_coefficients_come_from_the_input(name, saves):
    act = ACT2FN[name]
    act.configure(GluConfig(), 4)
    awake(act)
    act.double()
    if saves:
        keep_less(act, None)
    x = torch.randn(2, 3, 8 if act.gated else 4, dtype=torch.float64, requires_grad=True)
    vector = torch.rand(2, 3, 8, dtype=torch.float64, requires_grad=True)
    given = (x, vector, *act.parameters())

    def function(x, vector, *_):
        with within(Pass(act, Reading(2, 3, vector=vector))):
            return act(x)

    assert gradcheck(function, given, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(function, given, fast_mode=True)
    loss = function(*given).square().sum()
    found = torch.autograd.grad(loss, given, create_graph=True, materialize_grads=True)
    for ours, expected in zip(found, torch.autograd.grad(loss, given, materialize_grads=True), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, "exact up to rounding"), (torch.bfloat16, "bf16")])
def test_the_gradient_is_autograds(threads, dtype, tolerance):
    width = 512
    rows = 5 * SIZE // width + 7  # more than one block
    exact = arguments(torch.float64, rows, width)
    exact[0] = exact[0].to(dtype).double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for function, to in ((recomputed_mix, dtype), (mix, torch.float64)):
            x, channel, row = (tensor.to(torch.float32 if to == dtype else to) for tensor in exact)
            x = x.to(to)
            given = [tensor.detach().requires_grad_() for tensor in (x, channel, row)]
            y = function(built(), *given)
            y.backward(torch.ones_like(y))
            parts = {"y": y.detach(), **dict(zip("xcr", (tensor.grad for tensor in given), strict=True))}
            found.append({name: part.double() for name, part in parts.items()})
    finally:
        torch.set_num_threads(before)
    assert found[0]["r"].shape == (rows, COUNT)
    for name, part in found[1].items():
        assert_same(found[0][name] / part.abs().max(), part / part.abs().max(), tolerance)


def test_the_same_bits_again_and_in_inference():
    x, channel, row = arguments(torch.float32, 5 * SIZE // 64, 64)
    found = []
    for _ in range(2):
        x.grad = None
        y = recomputed_mix(built(), x.requires_grad_(), channel, row)
        y.sum().backward()
        with torch.inference_mode():
            again = recomputed_mix(built(), x, channel, row).clone()
            found.append({"y": y.detach(), "grad": x.grad, "inference": again})
    assert_same(found[1], found[0], "bitwise")
    assert_same(found[0]["inference"], found[0]["y"], "bitwise")


def test_autocast():
    act = ACT2FN["modulated_moa_swiglu"]
    act.configure(GluConfig(), 64)
    awake(act)
    for key in ("threshold", "slope"):
        torch.nn.init.normal_(act.phi.shift.get_parameter(key))
    x = torch.randn(2, 5, 128)
    with within(Pass(act, Reading(2, 5, vector=torch.rand(2, 5, 8)))):
        exact = act(x).detach()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = act(x.bfloat16().requires_grad_())
    y.sum().backward()
    scale = exact.abs().max().double()
    assert_same(y.detach().double() / scale, exact.double() / scale, "bf16")


@pytest.mark.parametrize("name", ["moa_prelu", "moa_xielu_glu"])
def test_functions_with_parameters_are_trained(name):
    act = ACT2FN[name]
    act.configure(GluConfig(), 8)
    act.float()(torch.randn(4, 16 if act.gated else 8)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in act.parameters())


def test_modulation_has_the_gradient_of_autograd(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 6), (5, 2), (6, 2), (6, 2))
    given = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    monkeypatch.setattr("hf_glu.activation.kernels.blocks.SIZE", 12)
    assert_same(modulating.recomputed_modulation(*given).detach(), modulating.modulate(*given).detach(), "formula")
    for function in (modulating.modulate, modulating.recomputed_modulation):
        assert gradcheck(function, given, check_batched_grad=True, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(function, given, check_batched_grad=True, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moa_swiglu", "learnable_swiglu", "moa_gelu_new"])
def test_compiled_without_a_break(name):
    act = ACT2FN[name]
    act.configure(GluConfig(), 8)
    awake(act)
    x = torch.randn(4, 16 if act.gated else 8, requires_grad=True)
    found = []
    for function in (act, torch.compile(act, fullgraph=True)):
        act.zero_grad()
        x.grad = None
        y = function(x)
        y.square().sum().backward()
        found.append({"y": y.detach(), "x": x.grad, **{key: p.grad for key, p in act.named_parameters()}})
    assert_same(found[1], found[0], "exact up to rounding")
