"""Folding a modulation into a model's weights: it computes the same, loads anywhere, or is refused and as before."""

from __future__ import annotations

import pytest
import steered
import torch
from comparing import assert_same, outputs
from pico import make_native

import hf_glu
from hf_glu.errors import ConversionError, OptionError
from hf_glu.publishing.export.folding import unplugged

WITH_BIAS = ("bert", "gpt2", "bart", "opt")
CONVERTED = {"bert": "geglu", "gpt2": "stateful_geglu_new", "t5": "reglu", "opt": "learnable_reglu", "bart": "geglu"}


def random(made, seed=0):
    """Return a modulation of the same gates, with thresholds and slopes that no text gives."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size):
        return torch.randn(size, generator=generator) * 0.3

    thresholds = {name: draw(len(value)) for name, value in made.thresholds.items()}
    slopes = {name: draw(len(value)) for name, value in made.thresholds.items()}
    return hf_glu.GateModulation(thresholds=thresholds, log_slopes=slopes, samples=made.samples)


def steered_outputs(model, made, strength):
    with made.on(model, strength, check=False):
        return outputs(model)


def check_folded(model, strength=1.3):
    made = random(steered.fit(model))
    expected, plain = steered_outputs(model, made, strength), outputs(model)
    made.fold(model, strength)
    found = outputs(model)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5 * max(1.0, float(value.abs().max())))
    assert max((found[key] - plain[key]).abs().max() for key in plain) > 1e-3
    return found


@pytest.mark.parametrize("name", WITH_BIAS)
def test_dense_gates(name, tmp_path):
    model = steered.make(name)
    found = check_folded(model)
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path)), found, "bitwise")
    assert all(site.activation is None for site in hf_glu.find_sites(model))


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_gates(name, tmp_path):
    model = steered.make(name)
    hf_glu.convert(model, CONVERTED[name], check=False)
    found = check_folded(model)
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path)), found, "bitwise")


@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_biases_that_the_config_allows(name, tmp_path):
    model = steered.make(name)
    assert model.config.mlp_bias is False
    found = check_folded(model)
    assert model.config.mlp_bias is True
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same(outputs(loaded), found, "bitwise")
    steered.fit(loaded).fold(loaded)  # which has biases now


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_mixers(name):
    model = steered.make(name)
    check_folded(model)
    assert model.config.use_bias


def test_a_fold_loads_without_hf_glu(tmp_path):
    model = steered.make("llama")
    expected = check_folded(model)
    model.save_pretrained(tmp_path)
    with unplugged():
        assert_same(outputs(type(model).from_pretrained(tmp_path)), expected, "bitwise")


@pytest.mark.parametrize("name", ["t5", "t5_v1_1", "phi3"])
def test_no_bias_and_none_allowed(name):
    model = steered.make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConversionError, match="no bias"):
        steered.fit(model).fold(model)
    assert_same(dict(model.state_dict()), before, "bitwise")


def test_what_cant_be_folded():
    model = steered.make("gpt2")
    made = steered.fit(model)
    with pytest.raises(OptionError, match="one strength"):
        made.fold(model, [1.0, 2.0])
    with pytest.raises(OptionError, match="other weights"):
        made.fold(steered.make("gpt2", seed=3))
    with pytest.raises(OptionError, match="no gate"):
        made.fold(make_native("llama", num_hidden_layers=1))


def test_a_fold_that_computes_something_else_is_undone():
    model = steered.make("llama")
    made = random(steered.fit(model))
    mlp = model.model.layers[0].mlp
    beside = torch.nn.Linear(16, 40)  # as the adapters of Zamba2: what makes the gate isn't the projection alone
    mlp.gate_proj.register_forward_hook(lambda module, args, out: out + beside(args[0]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConversionError, match="beside its in-projections"):
        made.fold(model, 3.0)
    assert_same(dict(model.state_dict()), before, "bitwise")
    assert model.config.mlp_bias is False
