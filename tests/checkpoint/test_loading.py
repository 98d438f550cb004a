"""Conversion while loading: bitwise what converting after loading gives."""

import pytest
import torch
import transformers
from comparing import assert_same, outputs
from pico import FAMILIES

import hf_glu
from hf_glu.plugin.loading import Widened


def both(model_class, folder, family, target, **options):
    """Return the model converted while loading, and the one converted afterwards."""
    override = {FAMILIES[family].field: target}
    loaded, info = model_class.from_pretrained(folder, output_loading_info=True, **override, **options)
    assert not any(info.values()), info
    after = model_class.from_pretrained(folder, **options)
    hf_glu.convert(after, target, check=False)
    return loaded, after


def assert_equal(loaded, after):
    assert_same(dict(loaded.state_dict()), dict(after.state_dict()), "bitwise")
    assert_same(outputs(loaded), outputs(after), "bitwise")
    assert loaded.config.hf_glu == after.config.hf_glu


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharded", [False, True])
def test_every_family(family, sharded, tmp_path):
    made = FAMILIES[family]
    dense = made.make()
    dense.save_pretrained(tmp_path / "dense", **({"max_shard_size": "4KB"} if sharded else {}))
    loaded, after = both(type(dense), tmp_path / "dense", family, made.exact)
    assert_equal(loaded, after)
    assert_same(outputs(loaded), outputs(dense), "exact")
    loaded.save_pretrained(tmp_path / "gated")
    again, info = type(dense).from_pretrained(tmp_path / "gated", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again), outputs(loaded), "bitwise")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_dtypes_and_device_map(family, dtype, tmp_path):
    dense = FAMILIES[family].make()
    dense.save_pretrained(tmp_path)
    loaded, after = both(type(dense), tmp_path, family, FAMILIES[family].exact, dtype=dtype, device_map="cpu")
    assert loaded.dtype == dtype
    assert_same(dict(loaded.state_dict()), dict(after.state_dict()), "bitwise")


@pytest.mark.parametrize(("source", "target"), [("silu", "glu"), ("relu2", "reglu"), ("quick_gelu", "swiglu")])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_other_exact_routes(family, source, target, tmp_path):
    dense = FAMILIES[family].make(**{FAMILIES[family].field: source})
    dense.save_pretrained(tmp_path)
    assert_equal(*both(type(dense), tmp_path, family, target))


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_any_to_any_through_a_mix(family, tmp_path):
    dense = FAMILIES[family].make()
    dense.save_pretrained(tmp_path)
    override = {FAMILIES[family].field: "learnable_swiglu"}
    loaded, info = type(dense).from_pretrained(tmp_path, output_loading_info=True, **override)
    assert all(key.endswith(("mix", "annealed")) for key in info["missing_keys"])
    assert_same(outputs(loaded), outputs(dense), "exact")


def test_head_from_base_auto_class_and_some_layers(tmp_path):
    FAMILIES["bert"].make("BertModel").save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, hidden_act="geglu", hf_glu={"layers": [1]}
    )
    base = transformers.BertModel.from_pretrained(tmp_path)
    hf_glu.convert(base, "geglu", layers=[1])
    assert_same(dict(model.bert.encoder.state_dict()), dict(base.encoder.state_dict()), "bitwise")


def test_a_gated_checkpoint_passes_through(tmp_path):
    model = FAMILIES["t5"].make()
    hf_glu.convert(model, "reglu")
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, feed_forward_proj="reglu", output_loading_info=True)
    assert not any(info.values())
    assert_same(outputs(again), outputs(model), "bitwise")


def test_dense_models_load_and_save_as_ever(tmp_path):
    model = FAMILIES["bert"].make()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    made = getattr(again, "_weight_conversions", None) or []
    assert not [c for c in made if any(isinstance(op, Widened) for op in getattr(c, "operations", []))]


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_offloaded_to_disk(family, tmp_path):
    dense = FAMILIES[family].make()
    dense.save_pretrained(tmp_path / "dense")
    stacks = {name.split(".")[0]: "cpu" for name, _ in dense.named_parameters()}
    block = {"bert": "bert.encoder", "gpt2": "transformer.h", "t5": "encoder.block"}[family]
    inner = dict(dense.get_submodule(block.split(".")[0]).named_children())
    device_map = {name: "cpu" for name in stacks if name != block.split(".")[0]}
    device_map |= {f"{block.split('.')[0]}.{name}": "cpu" for name in inner}
    device_map |= {"lm_head": "cpu"} if hasattr(dense, "lm_head") else {}
    device_map[block] = "disk"
    override = {FAMILIES[family].field: FAMILIES[family].exact}
    loaded = type(dense).from_pretrained(
        tmp_path / "dense", device_map=device_map, offload_folder=tmp_path / "offload", **override
    )
    assert any(parameter.device.type == "meta" for parameter in loaded.parameters()), "nothing was offloaded"
    after = type(dense).from_pretrained(tmp_path / "dense")
    hf_glu.convert(after, FAMILIES[family].exact, check=False)
    assert_same(outputs(loaded), outputs(after), "bitwise")
