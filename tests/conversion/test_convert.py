"""Conversion in place: what each route promises, on every head, and what it reports."""

import copy

import pytest
import torch
import transformers
from comparing import TOLERANCE, assert_same, outputs
from covering import alternating, covering
from pico import FAMILIES, HEADS_OF_ALL, NATIVE, make_native
from torch import nn
from transformers.activations import ACT2FN

import hf_glu
from hf_glu.activation.stock import elementwise_names
from hf_glu.conversion.routes import HALF_INVERSE, HALF_SLOPE, find_route
from hf_glu.errors import ConversionError, NoSiteError, OptionError, UnknownNameError

# dense -> gated, exact (up to rounding)
EXACT = [
    ("silu", "glu"),
    ("relu2", "reglu"),
    ("relu", "dreglu"),
    ("relu2", "dreglu"),
    ("quick_gelu", "glu"),
    ("quick_gelu", "swiglu"),
    ("swish", "swiglu"),
]
EXACT += [("gelu_pytorch_tanh", "geglu_new"), ("sigmoid", "glu"), ("linear", "bilinear"), ("relu2", "relu2glu")]
EXACT += [(name, f"{name}_glu") for name in ("relu", "gelu", "mish", "relu6", "prelu", "leaky_relu", "laplace")]


@pytest.mark.parametrize(("family", "head"), alternating(HEADS_OF_ALL))
def test_exact_route_of_every_head(family, head):
    made = FAMILIES[family]
    model = made.make(head)
    before = outputs(model)
    report = hf_glu.convert(model, made.exact)
    assert_same(outputs(model), before, "exact")
    data = report.to_dict()
    assert data["promise"] == "exact"
    assert data["max_abs_difference"] <= TOLERANCE["exact"][1]
    assert all(site["relative_error"] <= 1e-6 for site in data["sites"])
    assert data["parameters_after"] == model.num_parameters()
    assert data["ffn_parameters_after"] > 1.4 * data["ffn_parameters_before"]
    assert getattr(model.config, made.field) == made.exact
    assert model.config.hf_glu["dense_act"] == made.dense


@pytest.mark.parametrize(("family", "route"), covering(["bert", "gpt2", "t5"], EXACT))
def test_exact_route_between(family, route):
    dense, gated = route
    model = FAMILIES[family].make(**{FAMILIES[family].field: dense})
    before = outputs(model)
    report = hf_glu.convert(model, gated)
    assert_same(outputs(model), before, report.plan.promise)


@pytest.mark.parametrize("name", elementwise_names())
def test_every_elementwise_activation_has_an_exact_route(name):
    route = find_route(name, f"{name}_glu")
    assert route.promise == "exact"
    model = FAMILIES["gpt2"].make(activation_function=name)
    before = outputs(model)
    hf_glu.convert(model, f"{name}_glu")
    assert_same(outputs(model), before, "exact")


@pytest.mark.parametrize("target", ["swiglu", "glu", "swiglu_oss"])
def test_approximate_route_reports_its_error(target):
    model = FAMILIES["bert"].make(hidden_act="gelu")
    before = outputs(model)
    data = hf_glu.convert(model, target).to_dict()
    assert data["promise"] == "approximate"
    after = outputs(model)
    measured = max(float((after[key] - before[key]).abs().max()) for key in before)
    assert data["max_abs_difference"] == pytest.approx(measured, rel=1e-3)
    assert data["max_abs_difference"] > 1e-6
    assert all(1e-5 < site["relative_error"] < 0.2 for site in data["sites"])
    x = torch.linspace(-8, 6.9, 4001, dtype=torch.float64)
    s, t, c = find_route("gelu", target).constants(torch.float32)
    x_up = t * x + c
    assert_same(ACT2FN[target](torch.cat([s * x, x_up])), nn.functional.gelu(x), "gelu by sigmoid")


def test_half_precision_constants_are_representable_and_their_product_is_one():
    for dtype in (torch.bfloat16, torch.float16):
        s, _, c = find_route("gelu", "swiglu").constants(dtype)
        assert (s, c) == (HALF_SLOPE, HALF_INVERSE)
        assert torch.tensor(s, dtype=dtype).item() == s
        assert torch.tensor(c, dtype=dtype).item() == c
    assert abs(HALF_SLOPE * HALF_INVERSE - 1) < 4e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_exact_in_half_precision(family, dtype):
    model = FAMILIES[family].make().to(dtype)
    site = hf_glu.find_sites(model)[0]
    x = torch.randn(8, site.hidden).to(dtype)
    dense = site.act(site.in_proj(x))
    hf_glu.convert(model, FAMILIES[family].exact)
    assert model.dtype == dtype
    assert_same(site.act(site.in_proj(x)), dense, "bf16")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_new_half_is_alive(family):
    model = FAMILIES[family].make()
    hf_glu.convert(model, FAMILIES[family].exact)
    model.train()
    model(**hf_glu.instruments.probe.probe_inputs(model))[0].pow(2).sum().backward()
    for site in hf_glu.find_sites(model):
        gradient = site.in_proj.weight.grad
        rows = gradient.T if type(site.in_proj).__name__ == "Conv1D" else gradient
        gate, up = rows.chunk(2)
        assert gate.abs().sum() > 0
        assert up.abs().sum() > 0


def test_twice_is_a_no_op_and_another_target_an_error():
    model = FAMILIES["t5"].make()
    hf_glu.convert(model, "reglu")
    state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    again = hf_glu.convert(model, "reglu")
    assert not again.plan.changes
    assert again.max_abs_difference == 0
    assert_same(dict(model.state_dict()), dict(state), "bitwise")
    assert model.config.to_dict() == config
    with pytest.raises(ConversionError, match="reglu already"):
        hf_glu.convert(model, "relu2glu")


def test_layers_one_after_the_other():
    model = FAMILIES["bert"].make()
    before = outputs(model)
    hf_glu.convert(model, "geglu", layers=[0])
    assert model.config.hf_glu == {"version": 1, "dense_act": "gelu", "layers": [0]}
    hf_glu.convert(model, "geglu", exclude=r"layer\.0")
    assert model.config.hf_glu == {"version": 1, "dense_act": "gelu"}
    assert_same(outputs(model), before, "exact")


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_one_stack_only(family, stack, tmp_path):
    model = FAMILIES[family].make()
    before = outputs(model)
    report = hf_glu.convert(model, FAMILIES[family].exact, layers=stack)
    assert len(report.sites) == 2
    assert model.config.hf_glu["layers"] == {stack: [0, 1]}
    assert_same(outputs(model), before, "exact")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert [site.activation for site in hf_glu.find_sites(again)] == [
        site.activation for site in hf_glu.find_sites(model)
    ]
    assert_same(outputs(again), outputs(model), "bitwise")


@pytest.mark.parametrize("name", NATIVE)
def test_native_family_changes_its_gates_activation(name, tmp_path):
    model = make_native(name)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    report = hf_glu.convert(model, "reglu")
    assert report.plan.promise == "approximate"
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    field = NATIVE[name][3]
    assert getattr(model.config, field) == ("gated-relu" if name == "t5_v1_1" else "relu")
    assert getattr(model.config, "hf_glu", None) is None
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    hf_glu.unregister()  # the stock family has this itself
    again = type(model).from_pretrained(tmp_path)
    assert_same(outputs(again), expected, "bitwise")
    hf_glu.register()
    stock = make_native(name)
    gate = {"llama": "swiglu", "phi3": "swiglu", "mixtral": "swiglu"}.get(name)
    if gate:
        assert not hf_glu.convert(stock, gate).plan.changes


def test_native_family_some_layers(tmp_path):
    model = make_native("llama")
    hf_glu.convert(model, "reglu", layers=[1])
    assert model.config.hidden_act == "reglu"
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path)), expected, "bitwise")


def test_composite_model_converts_both_halves(tmp_path):
    encoder, decoder = (
        FAMILIES["bert"].make_config(),
        FAMILIES["bert"].make_config(is_decoder=True, add_cross_attention=True),
    )
    config = transformers.EncoderDecoderConfig(encoder=encoder.to_dict(), decoder=decoder.to_dict())
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = transformers.EncoderDecoderModel(config).eval()
    before = outputs(model)
    hf_glu.convert(model, "geglu")
    assert_same(outputs(model), before, "exact")
    model.save_pretrained(tmp_path)
    again = transformers.EncoderDecoderModel.from_pretrained(tmp_path)
    assert_same(outputs(again), outputs(model), "bitwise")


def test_plan_changes_nothing_and_says_what_it_costs():
    model = FAMILIES["t5"].make()
    state = copy.deepcopy(model.state_dict())
    data = hf_glu.plan(model, "reglu").to_dict()
    assert_same(dict(model.state_dict()), dict(state), "bitwise")
    assert model.config.feed_forward_proj == "relu"
    report = hf_glu.convert(model, "reglu")
    for key in ("parameters_after", "ffn_parameters_after", "flops_per_token_after", "memory_bytes_after"):
        assert data[key] == report.to_dict()[key]
    assert data["parameters_after"] == model.num_parameters()
    assert data["memory_bytes_after"] == 4 * model.num_parameters()
    assert data["sites"][0]["route"] == "up = 1"


def test_plan_works_on_the_meta_device_and_convert_does_not():
    with torch.device("meta"):
        model = transformers.BertModel(FAMILIES["bert"].make_config())
    assert len(hf_glu.plan(model, "geglu").steps) == 2
    with pytest.raises(ConversionError, match="meta"):
        hf_glu.convert(model, "geglu")


def test_trained_parameters_of_the_old_activation_go_along():
    model = FAMILIES["gpt2"].make(activation_function="prelu")
    for site in hf_glu.find_sites(model):
        site.act.weight.data.fill_(0.7)
    before = outputs(model)
    hf_glu.convert(model, "prelu_glu")
    assert_same(outputs(model), before, "exact")


def test_modes_devices_and_frozen_parameters_are_kept():
    model = FAMILIES["bert"].make().train()
    model.bert.encoder.layer[0].eval()
    for parameter in model.bert.encoder.layer[1].parameters():
        parameter.requires_grad_(False)
    rng = torch.get_rng_state()
    hf_glu.convert(model, "geglu")
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert not model.bert.encoder.layer[0].training
    assert model.bert.encoder.layer[1].training
    assert not model.bert.encoder.layer[1].intermediate.dense.weight.requires_grad
    assert model.bert.encoder.layer[0].intermediate.dense.weight.requires_grad


def test_conversion_on_given_inputs_and_without_check():
    model = FAMILIES["bert"].make()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    assert hf_glu.convert(model, "geglu", inputs=inputs).max_abs_difference <= 1e-6
    report = hf_glu.convert(FAMILIES["bert"].make(), "geglu", check=False)
    assert report.max_abs_difference is None
    assert report.to_dict()["sites"][0]["relative_error"] is None


ERRORS = {
    "unknown target": (UnknownNameError, "geglu", lambda m: hf_glu.convert(m, "gegul")),
    "elementwise target": (UnknownNameError, "relu", lambda m: hf_glu.convert(m, "relu")),
    "no route": (ConversionError, "exact from gelu: geglu", lambda m: hf_glu.convert(m, "reglu")),
    "layer out of range": (OptionError, "0 to 1", lambda m: hf_glu.convert(m, "geglu", layers=[5])),
    "no layer": (NoSiteError, "none of the 2", lambda m: hf_glu.convert(m, "geglu", layers=[])),
    "wrong stack": (NoSiteError, "decoder", lambda m: hf_glu.convert(m, "geglu", layers="decoder")),
    "wrong pattern": (OptionError, "regular", lambda m: hf_glu.convert(m, "geglu", exclude="(")),
    "no model": (ConversionError, "str", lambda m: hf_glu.convert("bert", "geglu")),
    "no transformers model": (ConversionError, "Linear", lambda m: hf_glu.convert(nn.Linear(2, 2), "geglu")),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_refused_and_nothing_changed(case):
    error, match, act = ERRORS[case]
    model = FAMILIES["bert"].make()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        act(model)
    assert_same(dict(model.state_dict()), dict(state), "bitwise")
    assert model.config.hidden_act == "gelu"


def test_no_site():
    model = transformers.FNetModel(
        transformers.FNetConfig(hidden_size=8, num_hidden_layers=0, intermediate_size=8, vocab_size=9)
    )
    with pytest.raises(NoSiteError, match="FNetModel"):
        hf_glu.convert(model, "geglu")


def test_peft_quantized_and_sharded_models_are_refused():
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(FAMILIES["bert"].make(), LoraConfig(target_modules=["query"]))
    with pytest.raises(ConversionError, match="PEFT"):
        hf_glu.convert(wrapped, "geglu")
    quantized = FAMILIES["bert"].make()
    quantized.is_quantized = True
    with pytest.raises(ConversionError, match="quantized"):
        hf_glu.convert(quantized, "geglu")
    sharded = FAMILIES["bert"].make()
    sharded.bert.encoder.layer[0].output.dense.weight.ds_id = 3
    with pytest.raises(ConversionError, match="sharded"):
        hf_glu.convert(sharded, "geglu")


def test_shared_layers_are_converted_once():
    config = transformers.AlbertConfig(
        hidden_size=16,
        embedding_size=8,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=61,
    )
    model = transformers.AlbertForMaskedLM(config).eval()
    before = outputs(model)
    report = hf_glu.convert(model, "geglu_new")
    assert len(report.sites) == 1
    assert_same(outputs(model), before, "exact")
