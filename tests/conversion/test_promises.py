"""What a conversion promises is what is measured: options that change the function, mixers, and what is above it."""

import mixers
import pytest
import torch
from comparing import assert_same, outputs
from covering import covering
from pico import FAMILIES, make_native

import hf_glu
from hf_glu.config.experts import ExpertOptions
from hf_glu.conversion import measure
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.mixers import GatedMixer


@pytest.mark.parametrize("state", [{"alpha": 1.0}, {"beta": -2}, {"alpha": 1e-3, "learnable": False}])
@pytest.mark.parametrize("experts", [None, "stateful_geglu_new*2,geglu_new*2"])
def test_a_state_that_is_awake_is_approximate(state, experts):
    model = FAMILIES["gpt2"].make()
    before = outputs(model)["logits"]
    target = "geglu_new" if experts else "stateful_geglu_new"
    data = hf_glu.convert(model, target, state=state, experts=experts).to_dict()
    assert data["promise"] == "approximate"
    assert "alpha and beta aren't 0" in data["sites"][0]["note"]
    measured = float((outputs(model)["logits"] - before).abs().max())
    assert measured > 1e-6
    assert data["max_abs_difference"] == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("state", [{"alpha": 0, "beta": 0.0}, {"decay": [0.2, 0.3]}, {"learnable": False}])
def test_a_state_that_sleeps_is_exact(state):
    report = hf_glu.convert(FAMILIES["gpt2"].make(), "stateful_geglu_new", state=state)
    assert report.plan.promise == "exact"
    assert report.max_abs_difference < 1e-6


@pytest.mark.parametrize(("top_k", "promise"), [(1, "exact"), (2, "approximate")])
def test_experts_that_are_added_up_are_approximate(top_k, promise):
    experts = ExpertOptions(groups="geglu_new*4", top_k=top_k, weights="ones")
    report = hf_glu.convert(FAMILIES["gpt2"].make(), "geglu_new", experts=experts)
    assert report.plan.promise == promise
    assert (report.max_abs_difference > 1e-4) == (promise == "approximate")


# target -> promise; the gate is a silu, whatever the convolution's activation is
MIXERS = {
    "swiglu": "exact", "stateful_swiglu": "exact", "stateful_silu": "exact", "geglu": "approximate",
    "moa_swiglu": "exact up to rounding", "learnable_geglu": "exact up to rounding",
}  # fmt: skip


@pytest.mark.parametrize(("name", "act", "target"), covering(mixers.MODELS, ["silu", "gelu", "relu"], MIXERS))
def test_a_mixers_gate_is_a_silu(name, act, target, tmp_path):
    promise = MIXERS[target]
    model = mixers.make(name, hidden_act=act)
    before = outputs(model)
    report = hf_glu.convert(model, target)
    assert report.plan.promise == promise
    assert {step.source for step in report.plan.steps} == {"silu"}
    if promise == "approximate":
        assert report.max_abs_difference > 1e-2
        assert any(isinstance(module, GatedMixer) for module in model.modules())
    else:
        assert_same(outputs(model), before, "exact up to rounding")
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again.eval()), outputs(model), "bitwise")


@pytest.mark.parametrize(
    ("name", "prefix"),
    covering(
        ["llama", "t5_v1_1", "phi3", "modernbert"], ["stateful_", "modulated_", "learnable_", "stateful_modulated_moa_"]
    ),
)
def test_an_elementwise_name_means_the_gate_of_a_natively_gated_family(name, prefix, tmp_path):
    model, gated = make_native(name), make_native(name)
    gate = {"llama": "silu", "phi3": "silu", "t5_v1_1": "gelu_new", "modernbert": "gelu"}[name]
    before = outputs(model)
    report = hf_glu.convert(model, prefix + gate)
    assert report.plan.promise == "exact"
    assert_same(outputs(model), before, "exact")
    hf_glu.convert(gated, f"{prefix}{gate}_glu")
    assert model.state_dict().keys() == gated.state_dict().keys()
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path).eval()), outputs(model), "bitwise")


@pytest.fixture
def lie(monkeypatch):
    """Have every conversion change an output-projection's weights as well."""
    plain = measure.Comparison.finish

    def finish(self, promise):
        with torch.no_grad():
            hf_glu.find_sites(self._model)[0].out_proj.weight.mul_(50)
        return plain(self, promise)

    monkeypatch.setattr(measure.Comparison, "finish", finish)


@pytest.mark.usefixtures("lie")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("family", "target"), [("bert", "geglu"), ("gpt2", "stateful_geglu_new"), ("t5", "reglu")])
def test_what_is_above_the_promise_raises_and_names_both(family, target, dtype):
    with pytest.raises(ConversionError, match=r"promises to be exact, but .* differs by [\d.e+-]+ of its size"):
        hf_glu.convert(FAMILIES[family].make().to(dtype), target)
    report = hf_glu.convert(FAMILIES[family].make().to(dtype), target, check="report")
    assert report.plan.promise == "exact"
    assert report.max_abs_difference > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_is_within_the_promise(family, dtype):
    assert hf_glu.convert(FAMILIES[family].make().to(dtype), FAMILIES[family].exact).plan.promise == "exact"


def test_an_output_that_becomes_nan_is_above_any_promise(monkeypatch):
    model = FAMILIES["bert"].make()
    monkeypatch.setattr(measure.SiteProbe, "errors", lambda self: {"encoder.layer.0": float("nan")})
    with pytest.raises(ConversionError, match=r"encoder\.layer\.0 differs by nan"):
        hf_glu.convert(model, "geglu")


def test_check_is_one_of_three():
    with pytest.raises(OptionError, match="check must be True, False or 'report'"):
        hf_glu.convert(FAMILIES["bert"].make(), "geglu", check="never")


@pytest.mark.parametrize("part", ["down_proj", "gate_proj", "up_proj"])
def test_experts_keep_biases_that_only_some_projections_have(part):
    model = make_native("llama")
    for layer in model.model.layers:
        projection = getattr(layer.mlp, part)
        projection.bias = torch.nn.Parameter(torch.randn(projection.out_features))
    report = hf_glu.convert(model, "swiglu", experts=4)
    assert report.plan.promise == "exact"
    assert report.max_abs_difference < 1e-5


def test_what_is_nan_everywhere_is_no_proof():
    model = FAMILIES["gpt2"].make()
    torch.nn.init.constant_(model.transformer.ln_f.weight, float("nan"))
    with pytest.raises(OptionError, match="NaN everywhere, before as after"):
        hf_glu.convert(model, "geglu_new")
