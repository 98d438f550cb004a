"""Other activations in other layers."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_same, outputs
from pico import FAMILIES, make_native

import hf_glu
from hf_glu.errors import ConversionError, OptionError, UnknownNameError

TOKENS = torch.arange(1, 33).reshape(4, 8)


def activations(model):
    return [site.activation for site in hf_glu.find_sites(model)]


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "bart"])
def test_mapping_saves_and_loads(family, tmp_path):
    model = FAMILIES[family].make()
    dense, exact = outputs(model), FAMILIES[family].exact
    mapping = {"0": exact, "1": f"learnable_{exact}"}
    report = hf_glu.convert(model, mapping)
    assert report.plan.promise == "exact"
    assert_same(outputs(model), dense, "exact")
    assert set(activations(model)) == set(mapping.values())
    assert not hf_glu.convert(model, mapping).plan.changes
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert activations(again) == activations(model)
    assert_same(outputs(again), outputs(model), "bitwise")
    hf_glu.anneal(again, 1.0)
    hf_glu.freeze_mix(again)
    assert set(activations(again)) == {exact}
    again.save_pretrained(tmp_path / "frozen")
    assert_same(outputs(type(model).from_pretrained(tmp_path / "frozen")), outputs(again), "bitwise")


def test_stacks_and_the_first_key_counts(tmp_path):
    model = FAMILIES["t5"].make()
    hf_glu.convert(model, {"encoder 0": "relu2glu", "encoder": "reglu", "decoder 1": "bilinear"}, calibration=TOKENS)
    assert activations(model) == ["relu2glu", "reglu", None, "bilinear"]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert activations(again) == activations(model)
    assert_same(outputs(again), outputs(model), "bitwise")


def test_one_call_after_the_other(tmp_path):
    one, other = FAMILIES["bert"].make(), FAMILIES["bert"].make()
    hf_glu.convert(one, {"0": "geglu", "1": "swiglu"})
    hf_glu.convert(other, "geglu", layers=[0])
    hf_glu.convert(other, "swiglu", layers=[1])
    assert one.config.hf_glu == other.config.hf_glu
    assert_same(outputs(one), outputs(other), "bitwise")


def test_native_gates_layer_by_layer(tmp_path):
    model = make_native("llama")
    hf_glu.convert(model, "reglu", layers=[0])
    hf_glu.convert(model, "geglu", layers=[1])
    assert [type(site.act).__name__ for site in hf_glu.find_sites(model)] == ["ReLU", "GELUActivation"]
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path)), outputs(model), "bitwise")


def test_from_config_alone():
    model = FAMILIES["gpt2"].make(activation_function="swiglu", hf_glu={"by_layer": {"1": "reglu"}})
    assert activations(model) == ["swiglu", "reglu"]


def test_reverts():
    model = FAMILIES["bert"].make()
    before, state = outputs(model), {key: value.clone() for key, value in model.state_dict().items()}
    hf_glu.convert(model, {"0": "geglu", "1": "gelu_glu"})
    hf_glu.revert(model)
    assert_same(outputs(model), before, "bitwise")
    assert_same(dict(model.state_dict()), state, "bitwise")


@pytest.mark.parametrize(
    ("mapping", "error", "says"),
    [
        ({}, OptionError, "such as"),
        ({"0-9": "geglu"}, OptionError, "out of range"),
        ({"0": "gegl"}, UnknownNameError, "geglu"),
        ({0: "geglu"}, OptionError, "such as"),
        ({"0": "geglu", "1": "reglu"}, ConversionError, "no route"),
    ],
)
def test_bad_mapping(mapping, error, says):
    model = FAMILIES["bert"].make()
    before = model.config.to_dict()
    with pytest.raises(error, match=says):
        hf_glu.convert(model, mapping)
    assert model.config.to_dict() == before
