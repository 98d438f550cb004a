"""Configs and options that are not what they should be: one clear error, nothing allocated, no time lost."""

from __future__ import annotations

import json
import time

import pytest
import torch
import transformers
from fuzz.configs import fuzz
from pico import FAMILIES

import hf_glu
from hf_glu.checkpoint.carrying import without_paths
from hf_glu.checkpoint.loading import load_model, load_skeleton
from hf_glu.config.experts import ExpertOptions, read_groups
from hf_glu.config.layers import check_layers
from hf_glu.errors import CheckpointError, DataError, HfGluError, OptionError, shown
from hf_glu.training.filling import split_options
from hf_glu.training.options import JobOptions, TrainingOptions

DEEP: list = []
for _ in range(5000):
    DEEP = [DEEP]
BAD_ENTRIES = [
    3,
    "geglu",
    ["geglu"],
    {"version": True},
    {"version": 10**400},
    {"version": 2},
    {"activation": 3},
    {"activation": "x" * 10_000},
    {"dense_act": ["gelu"]},
    {"bias": 1},
    {"layers": [1, "a"]},
    {"layers": [[1, [2]]]},
    {"layers": [10**30]},
    {"layers": "9" * 5000},
    {"layers": "0," * 50_000},
    {"layers": {"encoder": {"encoder": 1}}},
    {"layers": DEEP},
    {"layers": [True]},
    {"by_layer": []},
    {"by_layer": {"0": ["geglu"]}},
    {"by_layer": {"a": "geglu"}},
    {"width": 10**12},
    {"width": "9" * 5000},
    {"width": [3]},
    {"mix": []},
    {"mix": {"functions": "gelu"}},
    {"mix": {"functions": [["gelu"]]}},
    {"mix": {"functions": ["gelu"] * 1000}},
    {"mix": {"per": ["layer"]}},
    {"mix": {"rank": 10**12}},
    {"mix": {"rank": True}},
    {"state": [1]},
    {"state": {"decay": [0.5, "a"]}},
    {"state": {"decay": [True, 0.9]}},
    {"state": {"alpha": 10**400}},
    {"state": {"alpha": True}},
    {"state": {"alpha": float("nan")}},
    {"context": {"size": 10**12}},
    {"context": {"size": True}},
    {"context": {"layer": 10**12}},
    {"experts": "relu*2"},
    {"experts": {}},
    {"experts": {"groups": ["relu*2"]}},
    {"experts": {"groups": "relu*999999999"}},
    {"experts": {"groups": "relu:999999999*2"}},
    {"experts": {"groups": "relu:1048576*4096"}},
    {"experts": {"groups": "relu*" + "9" * 5000}},
    {"experts": {"groups": "relu*2", "shared": "nope*nope"}},
    {"experts": {"groups": "relu*2", "shared": "gelu*99999"}},
    {"experts": {"groups": "relu*2", "balance": 10**400}},
    {"experts": {"groups": "relu*2", "balance": True}},
    {"experts": {"groups": "relu*2", "z": float("inf")}},
    {"experts": {"groups": "relu*2", "top_k": [2]}},
    {"lay": 1},
    {"x" * 10_000: 1},
]


@pytest.mark.parametrize("entry", BAD_ENTRIES, ids=lambda entry: shown(entry)[:40])
def test_entries_are_refused_in_one_short_line(entry):
    begin = time.perf_counter()
    with pytest.raises(HfGluError) as caught:
        hf_glu.GluConfig.from_dict(entry)
    assert time.perf_counter() - begin < 1
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_what_models_have_is_taken():
    for layers in ([0, 95], "0-95", "every 3", {"encoder": "0-5", "decoder": [1]}, range(4), {1, 2}):
        check_layers(layers)
    assert sum(group.count for group in read_groups("swiglu:2048*256,relu*256")) == 512
    assert ExpertOptions(groups="relu:53248*8", top_k=8, balance=1, z=0).count == 8
    assert hf_glu.GluConfig(width=131_072, mix={"functions": ["gelu"] * 8, "rank": 512}).width == 131_072


BAD_CONFIGS = {
    "a list of lists": ({"architectures": [["BertModel"]]}, "architectures must be a list of names"),
    "a name alone": ({"architectures": "BertModel"}, "architectures must be a list of names"),
    "another family": ({"architectures": ["GPT2LMHeadModel"]}, "no model of the type bert"),
    "no model": ({"architectures": ["BertConfig"]}, "no model of the type bert"),
    "a function": ({"architectures": ["pipeline"]}, "no model of the type bert"),
    "an auto class": ({"architectures": ["AutoModel"]}, "no model of the type bert"),
    "the base of all": ({"architectures": ["PreTrainedModel"]}, "no model of the type bert"),
    "a type that is none": ({"model_type": ["bert"]}, "model_type must be a name"),
    "layers": ({"num_hidden_layers": 10**9}, "no model has num_hidden_layers=1000000000"),
    "heads": ({"num_attention_heads": 0}, "can't be loaded: "),
    "a width of words": ({"intermediate_size": "wide"}, "can't be loaded: "),
    "a huge vocabulary": ({"vocab_size": 10**18}, "no model has vocab_size"),
    "an activation": ({"hidden_act": "gegul"}, "did you mean 'geglu'"),
    "an entry": ({"hf_glu": {"experts": {"groups": "relu*999999999"}}}, "at most 4,096 experts"),
    "an entry of another kind": ({"hf_glu": [1]}, "must be a dict of options"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configs_are_refused_before_anything_is_built(case, tmp_path):
    change, says = BAD_CONFIGS[case]
    FAMILIES["bert"].make().save_pretrained(tmp_path / "bert")
    path = tmp_path / "bert" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for load in (
        load_skeleton,
        load_model,
        lambda source: hf_glu.convert_checkpoint(source, tmp_path / "out", "geglu"),
    ):
        begin = time.perf_counter()
        with pytest.raises(HfGluError) as caught:
            load(tmp_path / "bert")
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
        assert time.perf_counter() - begin < 20
    assert [each.name for each in tmp_path.iterdir()] == ["bert"]


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"model_type": "bert"', "[" * 100_000, '{"vocab_size": ' + "9" * 5000]
)
def test_a_broken_config_is_one_line(text, tmp_path):
    FAMILIES["bert"].make().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(HfGluError, match=r"config\.json, line 1"):
        load_model(tmp_path)


def test_parts_of_composites_are_models_of_their_own(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**vision, "vocab_size": 60}, vision_config={**vision, "patch_size": 16}
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    model.save_pretrained(tmp_path)
    assert type(load_model(tmp_path)) is transformers.CLIPModel
    changed = {**json.loads((tmp_path / "config.json").read_text()), "architectures": ["CLIPTextModel"]}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    assert type(load_model(tmp_path)) is transformers.CLIPTextModel


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 10**400},
        {"epochs": float("nan")},
        {"max_steps": [1]},
        {"lr": "9" * 5000},
        {"seed": {}},
        {"precision": "x" * 10_000},
        {"batch_size": True},
        {"patience": [[1]]},
        {"x" * 10_000: 1},
        {"warmup": "1e400"},
    ],
)
def test_options_are_refused_in_one_short_line(values):
    with pytest.raises(HfGluError) as caught:
        split_options(values, JobOptions, TrainingOptions)
    assert len(str(caught.value)) < 1000


def test_mutants_are_taken_or_refused():
    result = fuzz(150, seed=0)
    assert result["bad"] == []
    assert result["mutants"] == 150


def test_the_fuzzer_can_find_something(monkeypatch):
    def late(entry):
        raise TypeError("an error that isn't ours")

    monkeypatch.setattr("hf_glu.config.layers.check_layers", late)
    bad = fuzz(20, seed=0)["bad"]
    assert bad
    assert all("bad: TypeError" in line for line in bad)


def test_selections_nested_in_selections_are_refused():
    for spec in ({"encoder": "decoder 0"}, "encoder encoder 1", {"decoder": {"encoder": "0"}}):
        with pytest.raises(OptionError, match="by number"):
            check_layers(spec)


def test_a_config_of_a_far_larger_model_is_refused_before_it_is_allocated(tmp_path):
    FAMILIES["bert"].make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 2**31}))
    with pytest.raises(CheckpointError, match="says a model of 73"):
        load_model(tmp_path)


def test_values_nested_too_deeply_have_no_paths_taken_out():
    deep: list = []
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(DataError, match="nested"):
        without_paths(deep)
