"""Models from GGUF files: converted in Python and by the command line, saved as ordinary models."""

import json

import numpy as np
import pytest
import torch
from comparing import assert_same
from ggufs import write
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_glu
from hf_glu import cli
from hf_glu.checkpoint.loading import load_model, load_skeleton
from hf_glu.conversion import engine
from hf_glu.conversion.gguf import forget_gguf, is_from_gguf, is_unpacked
from hf_glu.errors import CheckpointError, ConversionError

gguf = pytest.importorskip("gguf")

IDS = torch.arange(10)[None]


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "tiny.gguf")


def test_a_model_that_transformers_has_read_is_converted(file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    before = model(IDS).logits
    hf_glu.plan(model, "learnable_swiglu")
    if is_from_gguf(model):  # planning changes nothing
        assert is_unpacked(model)
        assert model.hf_quantizer is not None
    assert hf_glu.convert(model, "learnable_swiglu").max_abs_difference == 0
    assert_same(model(IDS).logits, before, "bitwise")
    assert not is_from_gguf(model)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_conversion_that_fails_leaves_the_quantizer(file, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    known = dict(vars(model)), dict(vars(model.config))

    def break_off(model):
        forget_gguf(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "forget_gguf", break_off)
    with pytest.raises(KeyboardInterrupt):
        hf_glu.convert(model, "learnable_swiglu")
    assert (dict(vars(model)), dict(vars(model.config))) == known


def test_blocks_of_a_file_are_no_weights(file):
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    if not is_from_gguf(model):
        pytest.skip("this Transformers leaves no quantizer on the model")
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.detach().byte(), requires_grad=False)
    with pytest.raises(ConversionError, match="dequantize"):
        hf_glu.convert(model, "learnable_swiglu")


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_the_command_line_converts_a_file(kind, tmp_path, capsys):
    file = write(tmp_path / "tiny.gguf", kind)
    assert cli.run(["sites", str(file)]) == 0
    assert cli.run(["convert", str(file), "--to", "learnable_swiglu", "--plan"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
    assert cli.run(["convert", str(file), str(tmp_path / "out"), "--to", "learnable_swiglu"]) == 0
    assert cli.run(["verify", str(file), str(tmp_path / "out"), "--tolerance", "0"]) == 0
    capsys.readouterr()
    source, made = load_model(file), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert source.dtype == made.dtype == torch.float32
    assert torch.equal(source(IDS).logits, made(IDS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("e") == 8
    assert json.loads((tmp_path / "out" / "hf_glu_report.json").read_text())["base"]["name"] == "tiny"
    assert "import hf_glu" in (tmp_path / "out" / "README.md").read_text()


def test_a_skeleton_has_the_files_shapes(file):
    shapes = {name: tensor.shape for name, tensor in load_skeleton(file).state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in load_model(file).state_dict().items()}


def test_broken_files_are_one_line(file, tmp_path, capsys):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:200])
    for source in (broken, tmp_path / "nowhere.gguf"):
        assert cli.run(["convert", str(source), str(tmp_path / "out"), "--to", "learnable_swiglu"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert source.name in captured.err
        assert captured.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="no file"):
        load_model(tmp_path / "nowhere.gguf")
