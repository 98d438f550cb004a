"""Checkpoints converted from file to file, and what is left when that goes wrong."""

import json
import os

import pytest
import torch
import transformers
from comparing import assert_same, outputs
from pico import FAMILIES
from safetensors.torch import load_file, save_file

import hf_glu
from hf_glu.checkpoint.files import REPORT_FILE
from hf_glu.checkpoint.folders import staged_folder
from hf_glu.checkpoint.hub import reachable, resolve
from hf_glu.checkpoint.loading import load_model, load_skeleton
from hf_glu.errors import CheckpointError, ConversionError, HfGluError, UnknownNameError


@pytest.fixture
def dense(tmp_path):
    folder = tmp_path / "dense"
    FAMILIES["bert"].make("BertForSequenceClassification").save_pretrained(folder)
    (folder / "vocab.txt").write_text("[UNK]\nword\n")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    return folder


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_convert_checkpoint(dense, tmp_path):
    before, files = load_model(dense), {p.name: p.read_bytes() for p in dense.iterdir() if p.is_file()}
    report = hf_glu.convert_checkpoint(dense, tmp_path / "gated", "geglu")
    assert report.max_abs_difference <= 1e-6
    assert listing(tmp_path / "gated") == sorted(
        ["1_Pooling", "1_Pooling/config.json", "config.json", REPORT_FILE, "model.safetensors", "vocab.txt"]
    )
    written = json.loads((tmp_path / "gated" / REPORT_FILE).read_text())
    assert written.pop("base") == {"name": "dense", "repository": False}
    assert written.pop("of").keys() == {"config.json", "model.safetensors"}
    assert written == json.loads(json.dumps(report.to_dict()))
    assert {p.name: p.read_bytes() for p in dense.iterdir() if p.is_file()} == files
    assert_same(outputs(load_model(tmp_path / "gated")), outputs(before), "exact")


def test_no_form_of_the_sources_weights_comes_along(dense, tmp_path):
    (dense / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    forms = ["onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.bin", "original/consolidated.00.pth"]
    forms += ["coreml/fill-mask/float32.mlpackage/Data/weight.bin", "a/b/model.tflite", "64.tflite", "tf_model.h5"]
    forms += ["checkpoint-5/optimizer.pt", "checkpoint-5/config.json", "model.onnx_data"]
    kept = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "a/notes.txt", "modules.json"]
    for name in (*forms, *kept):
        (dense / name).parent.mkdir(parents=True, exist_ok=True)
        if name != "modules.json":
            (dense / name).write_text("{}")
    hf_glu.convert_checkpoint(dense, tmp_path / "gated", "geglu")
    files = {name for name in listing(tmp_path / "gated") if (tmp_path / "gated" / name).is_file()}
    assert files == {*kept, "config.json", REPORT_FILE, "model.safetensors", "vocab.txt"}
    assert not (tmp_path / "gated" / "a" / "b").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype, tmp_path):
    FAMILIES["gpt2"].make().to(dtype).save_pretrained(tmp_path / "dense")
    hf_glu.convert_checkpoint(tmp_path / "dense", tmp_path / "gated", "geglu_new")
    weights = load_file(tmp_path / "gated" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}


def test_a_destination_that_exists_is_refused(dense, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(CheckpointError, match="exists already"):
        hf_glu.convert_checkpoint(dense, tmp_path / "full", "geglu")
    assert listing(tmp_path / "full") == ["mine"]
    (tmp_path / "empty").mkdir()
    hf_glu.convert_checkpoint(dense, tmp_path / "empty", "geglu")
    assert (tmp_path / "empty" / "config.json").is_file()
    with pytest.raises(CheckpointError, match="exists already"):
        hf_glu.convert_checkpoint(dense, dense / "config.json", "geglu")


@pytest.mark.parametrize(
    ("target", "error"), [("gegul", UnknownNameError), ("reglu", ConversionError), ("relu", UnknownNameError)]
)
def test_what_cannot_be_leaves_nothing(dense, tmp_path, target, error):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error):
        hf_glu.convert_checkpoint(dense, tmp_path / "gated", target)
    assert sorted(tmp_path.iterdir()) == before


def test_interrupted_in_the_middle_leaves_nothing(dense, tmp_path, monkeypatch):
    def interrupted(self, folder, **options):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", interrupted)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        hf_glu.convert_checkpoint(dense, tmp_path / "gated", "geglu")
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="No space left"), staged_folder(tmp_path / "out") as stage:
        (stage / "part").write_text("x")
        raise OSError(28, os.strerror(28))
    assert sorted(tmp_path.iterdir()) == []


def test_bad_sources(dense, tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(dense / "config.json")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        resolve("google-bert/bert-base-uncased")
    assert not reachable()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="can't be loaded"):
        load_model(tmp_path / "empty")
    weights = dense / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="can't be loaded"):
        load_model(dense)
    weights.write_bytes(data)
    tensors = load_file(weights)
    tensors.pop("bert.encoder.layer.0.output.dense.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks.*layer\.0\.output"):
        load_model(dense)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "model_type": "no_such"}))
    with pytest.raises(CheckpointError, match="no_such"):
        load_skeleton(dense)


def test_skeleton_has_no_weights(dense):
    skeleton = load_skeleton(dense)
    assert type(skeleton).__name__ == "BertForSequenceClassification"
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}


def test_verify(dense, tmp_path):
    hf_glu.convert_checkpoint(dense, tmp_path / "exact", "geglu")
    hf_glu.convert_checkpoint(dense, tmp_path / "approximate", "swiglu")
    same = hf_glu.verify(dense, tmp_path / "exact")
    assert same.same
    assert 0 < same.parameters[0] < same.parameters[1]
    assert not hf_glu.verify(dense, tmp_path / "approximate", tolerance=1e-9).same
    other = FAMILIES["bert"].make()
    with pytest.raises(HfGluError, match=r"kind|shape"):
        hf_glu.verify(dense, other)
    with pytest.raises(HfGluError, match="tolerance"):
        hf_glu.verify(dense, dense, tolerance=-1)
    t5 = FAMILIES["t5"].make()
    assert hf_glu.verify(t5, t5, inputs={"input_ids": torch.tensor([[5, 6, 1]])}).max_abs_difference == 0
