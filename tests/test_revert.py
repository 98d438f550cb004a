"""Undoing a conversion: the dense model bit by bit, or a reason why not."""

import pytest
from comparing import assert_same, outputs
from pico import FAMILIES

import hf_glu
from hf_glu.errors import ConversionError, NoSiteError


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
    hf_glu.convert(narrow, "geglu", width=20, calibration=[hf_glu.probe.probe_inputs(narrow)], distill_steps=0)
    with pytest.raises(ConversionError, match="narrower"):
        hf_glu.revert(narrow)
    with pytest.raises(ConversionError, match="never dense"):
        hf_glu.revert(FAMILIES["bert"].make(hidden_act="geglu"))
    with pytest.raises(NoSiteError, match="no converted"):
        hf_glu.revert(FAMILIES["bert"].make())
