"""Undoing a conversion: the dense model bit by bit, or a reason why not."""

import pytest
import torch
import transformers
from comparing import assert_same, outputs
from pico import FAMILIES, make_native

import hf_glu
from hf_glu.bench.coverage.tiny import tiny_model
from hf_glu.errors import ConversionError, NoSiteError
from hf_glu.ffn.sites import convertible_sites


def dense_config(config):
    return {key: value for key, value in config.to_dict().items() if key != "hf_glu"}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untouched_conversion_is_undone_bit_by_bit(family, tmp_path):
    made = FAMILIES[family]
    model, dense = made.make(), made.make()
    hf_glu.convert(model, made.exact)
    model.save_pretrained(tmp_path / "gated")
    model = type(model).from_pretrained(tmp_path / "gated")
    assert hf_glu.revert(model) == len(hf_glu.find_sites(dense))
    assert_same(dict(model.state_dict()), dict(dense.state_dict()), "bitwise")
    assert_same(outputs(model), outputs(dense), "bitwise")
    assert getattr(model.config, made.field) == made.dense
    model.save_pretrained(tmp_path / "dense")
    hf_glu.unregister()
    stock, info = type(model).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values())
    assert_same(outputs(stock), outputs(dense), "bitwise")


@pytest.mark.parametrize(("dense", "gated"), [("silu", "glu"), ("relu2", "reglu"), ("quick_gelu", "glu")])
def test_routes_that_copy(dense, gated):
    model, before = (FAMILIES["gpt2"].make(activation_function=dense) for _ in range(2))
    hf_glu.convert(model, gated)
    hf_glu.revert(model)
    assert_same(dict(model.state_dict()), dict(before.state_dict()), "bitwise")


def test_a_trained_or_narrowed_one_says_why_not():
    model = FAMILIES["bert"].make()
    hf_glu.convert(model, "geglu")
    hf_glu.find_sites(model)[1].in_proj.weight.data[-1, 0] += 1e-3
    before = outputs(model)
    with pytest.raises(ConversionError, match="trained"):
        hf_glu.revert(model)
    assert_same(outputs(model), before, "bitwise")
    narrow = FAMILIES["bert"].make()
    hf_glu.convert(
        narrow, "geglu", width=20, calibration=[hf_glu.instruments.probe.probe_inputs(narrow)], distill_steps=0
    )
    with pytest.raises(ConversionError, match="narrower"):
        hf_glu.revert(narrow)
    with pytest.raises(ConversionError, match="never dense"):
        hf_glu.revert(FAMILIES["bert"].make(hidden_act="geglu"))
    with pytest.raises(NoSiteError, match="no converted"):
        hf_glu.revert(FAMILIES["bert"].make())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", ["learnable_", "moa_"])  # wrappers: tests/house/test_methods.py
def test_what_has_no_effect_yet_is_undone_too(family, prefix):
    made = FAMILIES[family]
    model, dense = made.make(), made.make()
    hf_glu.convert(model, prefix + made.exact)
    assert hf_glu.revert(model) == len(hf_glu.find_sites(dense))
    assert_same(dict(model.state_dict()), dict(dense.state_dict()), "bitwise")
    assert_same(outputs(model), outputs(dense), "bitwise")
    assert hooks(model) == hooks(dense)
    assert dense_config(model.config) == dense_config(dense.config)


@pytest.mark.parametrize("family", ["llama", "phi3", "modernbert", "mamba"])
@pytest.mark.parametrize("target", ["stateful_swiglu", "modulated_swiglu", "learnable_swiglu"])
def test_gates_of_families_that_have_some_are_their_own_again(family, target, tmp_path):
    def make():
        if family != "mamba":
            return make_native(family, **({"hidden_activation": "silu"} if family == "modernbert" else {}))
        torch.manual_seed(0)
        return transformers.MambaForCausalLM(
            transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=61)
        )

    model, stock = make().eval(), make().eval()
    hf_glu.convert(model, target)
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    assert hf_glu.revert(model) == len(convertible_sites(stock))
    assert_same(dict(model.state_dict()), dict(stock.state_dict()), "bitwise")
    assert_same(outputs(model), outputs(stock), "bitwise")
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
    assert hooks(model) == hooks(stock)
    assert model.config.hf_glu is None
    with pytest.raises(NoSiteError):
        hf_glu.revert(model)


def hooks(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return [len(vars(module)[name]) for module in model.modules() for name in names]


def test_a_config_around_others_gets_its_own_name_back():
    model = tiny_model("phi4_multimodal")  # text, pictures and sound: silu, gelu_pytorch_tanh and swish
    before = model.config.to_dict()
    hf_glu.convert(model, "learnable_swiglu")
    assert model.config.hidden_act == "learnable_swiglu"
    hf_glu.revert(model)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("part", ["mix", "alpha", "weight"])
def test_a_trained_activation_or_out_projection_says_so(part):
    model = FAMILIES["bert"].make()
    hf_glu.convert(model, {"mix": "learnable_geglu", "alpha": "stateful_geglu", "weight": "geglu"}[part])
    site = hf_glu.find_sites(model)[1]
    trained = (
        [site.out_proj.weight]
        if part == "weight"
        else [p for name, p in site.act.named_parameters() if name.endswith(part)]
    )
    trained[0].data += 1e-3
    before = outputs(model)
    with pytest.raises(ConversionError, match="trained"):
        hf_glu.revert(model)
    assert_same(outputs(model), before, "bitwise")


def test_an_approximate_conversion_is_undone_where_it_was_made_and_not_fitted(tmp_path):
    model, dense = FAMILIES["bert"].make(), FAMILIES["bert"].make()
    hf_glu.convert(model, "geglu_new")
    model.save_pretrained(tmp_path)
    hf_glu.revert(model)
    assert_same(dict(model.state_dict()), dict(dense.state_dict()), "bitwise")
    loaded = type(model).from_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="approximate"):
        hf_glu.revert(loaded)
    hf_glu.convert(dense, "geglu_new", calibration=[hf_glu.instruments.probe.probe_inputs(dense)])
    with pytest.raises(ConversionError, match="fitted"):
        hf_glu.revert(dense)
