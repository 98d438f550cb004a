"""Small devices: each way to make a converted model small, the bench's table, and quantized checkpoints."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
import transformers
from comparing import assert_same, fresh_outputs, outputs
from pico import FAMILIES
from taskdata import make_tokenizer, vocabulary, write_dataset

import hf_glu
from hf_glu import cli
from hf_glu.bench import devices
from hf_glu.bench.running import BENCHES, BenchOptions
from hf_glu.bench.small import EAGER, WAYS
from hf_glu.checkpoint.loading import load_model
from hf_glu.config.extras import lacking
from hf_glu.errors import CheckpointError, ConversionError, MissingPackageError, OptionError
from hf_glu.instruments.probe import probe_inputs, run
from hf_glu.tasks import TASKS
from hf_glu.training.data.models import load_for_task

LARGER = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
CLASSIFIER = "BertForSequenceClassification"
HERE = [name for name, way in WAYS.items() if not lacking(*way.packages, what=name)]
QUICK = [name for name in HERE if "onnx" not in WAYS[name].packages]
TINY = ["--tokens", "6", "--rounds", "2", "--warmup", "1", "--threads", "1"]


def small_bert(target="geglu"):
    model = FAMILIES["bert"].make(CLASSIFIER, **LARGER)
    hf_glu.convert(model, target, check=False)
    model.classifier.weight.data *= 50  # logits of some size
    return model


@pytest.fixture
def answering(tmp_path):
    """A converted classifier with its tokenizer, and a dataset in the layout of the Hub."""
    model = FAMILIES["bert"].make(CLASSIFIER, vocab_size=len(vocabulary()))
    hf_glu.convert(model, "geglu", check=False)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model"), str(write_dataset(tmp_path / "data", "sst2"))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WAYS]
)
def test_each_way_is_small_and_near(name, tmp_path):
    if "torchao" in name:
        pytest.importorskip("torchao")
    model = small_bert()
    inputs = probe_inputs(model)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = run(model, inputs)["logits"]
    made = WAYS[name].make(model, tmp_path)
    found = run(made.model, inputs)["logits"]
    difference = (found.float() - expected).abs().max()
    full = sum(part.numel() * part.element_size() for part in model.state_dict().values())
    linear = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    quantized = "int8" in name
    assert_same(run(model, inputs)["logits"], expected, "bitwise")  # the model itself isn't touched
    if name.startswith(EAGER):
        assert difference < 1e-5
    else:
        assert 0 < difference < 0.1 * expected.abs().max()
    overhead = 300_000 if "ONNX" in name else 40_000  # a graph, module names
    ideal = full - 3 * linear if quantized else full / 2 if name == "bfloat16" else full
    assert 0.9 * ideal < made.size < ideal + overhead


@pytest.mark.slow
def test_gpt2s_layers_in_onnx_runtime(tmp_path):
    model = FAMILIES["gpt2"].make(n_embd=64, n_inner=192)
    hf_glu.convert(model, "geglu_new", check=False)
    sizes = {name: WAYS[name].make(model, tmp_path / str(at)).size for at, name in enumerate(WAYS)}
    assert sizes["int8, torch"] > 0.95 * sizes[EAGER]
    assert sizes["int8, ONNX Runtime"] < 0.6 * sizes["float32, ONNX Runtime"]


@pytest.mark.parametrize("target", ["geglu", pytest.param("modulated_stateful_moa_geglu", marks=pytest.mark.slow)])
def test_torchao_saved_and_loaded_again(target, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    small_bert(target).save_pretrained(tmp_path / "full")
    config = transformers.TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig())
    kind = transformers.BertForSequenceClassification
    quantized = kind.from_pretrained(tmp_path / "full", quantization_config=config).eval()
    site = hf_glu.find_sites(quantized)[0]
    assert "Int8" in type(site.in_proj.weight).__name__
    assert site.widened
    expected = outputs(quantized)
    assert (expected["logits"] - outputs(small_bert(target))["logits"]).abs().max() > 0
    quantized.save_pretrained(tmp_path / "int8")
    bytes_of = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "int8")}
    assert bytes_of["int8"] < 0.5 * bytes_of["full"]
    assert_same(outputs(load_model(tmp_path / "int8")), expected, "bitwise")
    with pytest.raises(ConversionError, match="quantized"):
        hf_glu.convert(load_model(tmp_path / "int8"), "geglu")
    if target != "geglu":  # a process takes seconds: the slow one starts it
        assert_same(fresh_outputs({CLASSIFIER: tmp_path / "int8"})[CLASSIFIER], expected, "bitwise")


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_bitsandbytes_that_isnt_there_is_one_line(answering, capsys):
    folder, _ = answering
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with open(f"{folder}/config.json", "w", encoding="utf-8") as file:
        json.dump(config, file)
    for load in (load_model, lambda source: load_for_task(source, TASKS["sst2"])):
        with pytest.raises(CheckpointError, match=r"can't be loaded.*bitsandbytes") as caught:
            load(folder)
        assert "\n" not in str(caught.value)
    assert cli.run(["export", folder, folder + "-out"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("hf-glu: ")


@pytest.mark.slow
def test_the_bench(answering, monkeypatch, capsys):
    folder, dataset = answering
    monkeypatch.setattr(devices, "WAYS", {name: WAYS[name] for name in QUICK})
    command = ["bench", "devices", "--model", folder, "--task", "sst2", "--dataset", dataset, *TINY]
    assert cli.run([*command, "--rows", "6", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["cell"]["batch"] for row in data["rows"] if row["contender"] == EAGER] == [1, 8]
    rows = {row["contender"]: row for row in data["rows"] if row["cell"]["batch"] == 1}
    assert set(rows) == {*QUICK, *(name + devices.PRUNED for name in QUICK if WAYS[name].pruned)}
    assert rows[EAGER]["peer"] is None
    assert all(row["peer"] == EAGER and row["ratio"] for name, row in rows.items() if name != EAGER)
    scores = {row["facts"]["score %"] for row in data["rows"]}
    assert all(score == pytest.approx(round(score * 6 / 100) * 100 / 6) for score in scores), "of 6 rows"
    units = {name: row["facts"]["units"] for name, row in rows.items()}
    assert units == {name: 27 if name.endswith(devices.PRUNED) else 40 for name in rows}
    assert rows["bfloat16"]["facts"]["MB"] < rows[EAGER]["facts"]["MB"]
    assert rows[EAGER + devices.PRUNED]["facts"]["MB"] < rows[EAGER]["facts"]["MB"]
    assert cli.run(command) == 0
    shown = capsys.readouterr().out
    assert "batch 8" in shown
    assert "score %" in shown
    assert "targets met" not in shown


def test_without_a_task_there_is_no_score(answering, monkeypatch):
    monkeypatch.setattr(devices, "WAYS", {name: WAYS[name] for name in QUICK})
    cell = next(iter(devices.cells(BenchOptions(model=answering[0], tokens="5"))))
    made = cell.build()
    assert list(made) == QUICK
    assert all(set(contender.facts) == {"units", "MB"} for contender in made.values())


def test_a_package_that_isnt_there_leaves_its_row_out(answering, monkeypatch):
    monkeypatch.setattr(devices, "lacking", lambda *names, what: MissingPackageError(what) if names else None)
    cell = next(iter(devices.cells(BenchOptions(model=answering[0], tokens="5"))))
    with pytest.warns(UserWarning, match="left out"):
        assert list(cell.build()) == [name for name in WAYS if not WAYS[name].packages]


def test_bad_input(answering, tmp_path, capsys):
    assert "devices" in BENCHES
    assert cli.run(["bench", "devices"]) == 2
    assert "needs --model DIR" in capsys.readouterr().err
    FAMILIES["t5"].make(vocab_size=len(vocabulary())).save_pretrained(tmp_path / "t5")
    make_tokenizer(end=True).save_pretrained(tmp_path / "t5")
    options = BenchOptions(model=str(tmp_path / "t5"), task="sst2", dataset=answering[1])
    with pytest.raises(OptionError, match="for classifiers"):
        next(iter(devices.cells(options))).build()
    with pytest.raises(OptionError, match="rows must be at least 1"):
        BenchOptions(rows=0)
