"""Configs that several models hold, and models that are saved with a config that says something else."""

import pytest
import torch
import transformers
from comparing import assert_same, outputs
from pico import FAMILIES, make_native

import hf_glu
from hf_glu.errors import CheckpointError


@pytest.mark.parametrize(("family", "target"), [("bert", "swiglu"), ("gpt2", "geglu_new")])
def test_a_model_of_the_same_config_stays_dense(family, target, tmp_path):
    model = FAMILIES[family].make()
    other = type(model)(model.config).eval()
    dense = model.config
    hf_glu.convert(model, target, check="report")
    before = outputs(other)
    other.save_pretrained(tmp_path / "dense")
    assert_same(outputs(type(other).from_pretrained(tmp_path / "dense")), before, "bitwise")
    model.save_pretrained(tmp_path / "gated")
    assert_same(outputs(type(model).from_pretrained(tmp_path / "gated")), outputs(model), "bitwise")
    assert model.config is model.base_model.config is not dense


def test_a_natively_gated_model_of_the_same_config_keeps_its_gate(tmp_path):
    model = make_native("llama")
    other = type(model)(model.config).eval()
    hf_glu.convert(model, "geglu")
    before = outputs(other)
    other.save_pretrained(tmp_path)
    assert_same(outputs(type(other).from_pretrained(tmp_path)), before, "bitwise")


def test_a_config_that_is_held_once_is_written_in_place():
    model = FAMILIES["bert"].make()
    config = model.config
    hf_glu.convert(model, "geglu")
    assert model.config is config
    assert config.hidden_act == "geglu"


def test_a_submodel_writes_into_the_config_around_it():
    model = FAMILIES["bert"].make()
    hf_glu.convert(model.bert, "geglu")
    assert model.config.hidden_act == "geglu"


def test_a_model_with_the_same_ffns_is_told_of(tmp_path):
    model, other = make_native("llama"), make_native("llama")
    other.model = model.model
    with pytest.warns(UserWarning, match="LlamaForCausalLM has FFNs of the LlamaForCausalLM"):
        hf_glu.convert(model, "stateful_geglu")
    with pytest.raises(CheckpointError, match="would load as silu, which the config of LlamaForCausalLM says"):
        other.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_layers_that_were_cut_off_are_not_saved_as_others(tmp_path):
    model = make_native("llama", num_hidden_layers=4)
    hf_glu.convert(model, {"0-1": "geglu"}, check=False)
    model.model.layers = model.model.layers[1:]
    model.config.num_hidden_layers = 3
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp is silu, and would load as gelu"):
        model.save_pretrained(tmp_path)


def test_a_class_that_takes_more_than_a_config_is_saved(tmp_path):
    class Wider(transformers.BertPreTrainedModel):
        def __init__(self, config, extra):
            super().__init__(config)
            self.bert, self.extra = transformers.BertModel(config), torch.nn.Linear(16, extra)
            self.post_init()

    config = FAMILIES["bert"].make_config(hidden_act="geglu")
    Wider(config, 3).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").is_file()
