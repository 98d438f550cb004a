"""Streaming gives what converting in memory gives, and leaves nothing where it can't."""

import json

import pytest
import torch
from comparing import assert_same, outputs
from pico import FAMILIES, make_native
from safetensors.torch import load_file, save_file

import hf_glu
from hf_glu import cli
from hf_glu.errors import CheckpointError, ConversionError


def load_all(folder):
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharded", [False, True])
def test_the_same_as_in_memory(family, sharded, tmp_path):
    made = FAMILIES[family]
    model = made.make()
    model.save_pretrained(tmp_path / "dense", **({"max_shard_size": "4KB"} if sharded else {}))
    (tmp_path / "dense" / "vocab.txt").write_text("a\n")
    report = hf_glu.convert_stream(tmp_path / "dense", tmp_path / "streamed", made.exact)
    hf_glu.convert_checkpoint(tmp_path / "dense", tmp_path / "memory", made.exact)
    assert_same(load_all(tmp_path / "streamed"), load_all(tmp_path / "memory"), "bitwise")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("streamed", "memory")]
    assert configs[0] == configs[1]
    assert (tmp_path / "streamed" / "vocab.txt").is_file()
    shards = [sorted(p.name for p in (tmp_path / n).glob("*.safetensors")) for n in ("dense", "streamed")]
    assert shards[0] == shards[1]
    again, info = type(model).from_pretrained(tmp_path / "streamed", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again), outputs(model), "exact")
    assert report.to_dict()["parameters_after"] == again.num_parameters()


@pytest.mark.parametrize(("family", "target"), [("bert", "swiglu"), ("gpt2", "glu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_approximate_routes_and_dtypes(family, target, dtype, tmp_path):
    FAMILIES[family].make().to(dtype).save_pretrained(tmp_path / "dense")
    hf_glu.convert_stream(tmp_path / "dense", tmp_path / "streamed", target, layers="1")
    hf_glu.convert_checkpoint(tmp_path / "dense", tmp_path / "memory", target, layers="1", check=False)
    assert_same(load_all(tmp_path / "streamed"), load_all(tmp_path / "memory"), "bitwise")


def test_a_head_over_a_base_checkpoint_and_a_native_family(tmp_path):
    FAMILIES["bert"].make("BertModel").save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    hf_glu.convert_stream(tmp_path / "base", tmp_path / "out", "geglu")
    assert load_all(tmp_path / "out")["encoder.layer.0.intermediate.dense.weight"].shape == (80, 16)
    make_native("llama").save_pretrained(tmp_path / "llama")
    hf_glu.convert_stream(tmp_path / "llama", tmp_path / "relu", "reglu")
    assert_same(load_all(tmp_path / "relu"), load_all(tmp_path / "llama"), "bitwise")
    assert json.loads((tmp_path / "relu" / "config.json").read_text())["hidden_act"] == "relu"


@pytest.fixture
def sharded(tmp_path):
    FAMILIES["gpt2"].make().save_pretrained(tmp_path / "dense", max_shard_size="4KB")
    return tmp_path / "dense"


def _break(folder, how):
    shard = sorted(folder.glob("*.safetensors"))[1]
    index = folder / "model.safetensors.index.json"
    if how == "missing shard":
        shard.unlink()
    elif how == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "no header":
        shard.write_bytes(b"x")
    elif how == "tensor missing":
        tensors = load_file(shard)
        tensors.popitem()
        save_file(tensors or {"other": torch.zeros(1)}, shard)
    elif how == "broken index":
        index.write_text("{")
    elif how == "no weights":
        index.unlink()


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("missing shard", "is missing"),
        ("truncated shard", "truncated"),
        ("no header", "truncated"),
        ("tensor missing", "lacks"),
        ("broken index", "no index"),
        ("no weights", "safetensors only"),
    ],
)
def test_broken_checkpoints_leave_nothing(how, match, sharded, tmp_path):
    _break(sharded, how)
    with pytest.raises(CheckpointError, match=match):
        hf_glu.convert_stream(sharded, tmp_path / "out", "geglu_new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_what_cannot_be_streamed(sharded, tmp_path):
    with pytest.raises(CheckpointError, match="parameters of its own"):
        hf_glu.convert_stream(sharded, tmp_path / "out", "learnable_swiglu")
    for target in ("stateful_geglu_new", "modulated_geglu_new", "stateful_gelu_new"):
        with pytest.raises(CheckpointError, match="parameters of its own"):
            hf_glu.convert_stream(sharded, tmp_path / "out", target)
    with pytest.raises(ConversionError, match="no route"):
        hf_glu.convert_stream(sharded, tmp_path / "out", "reglu")
    with pytest.raises(CheckpointError, match="exists already"):
        hf_glu.convert_stream(sharded, sharded, "geglu_new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_command(sharded, tmp_path, capsys):
    assert cli.run(["convert", str(sharded), str(tmp_path / "out"), "--to", "geglu_new", "--stream", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["promise"] == "exact"
    assert hf_glu.verify(sharded, tmp_path / "out").same
