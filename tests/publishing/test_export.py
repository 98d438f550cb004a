"""Exports: graphs compute what the model does on other shapes than the traced ones, folded models load in stock."""

from __future__ import annotations

import json
import sys
from itertools import product

import pytest
import torch
import transformers
from comparing import assert_same, fresh_process, outputs
from pico import FAMILIES, VOCAB, make_native
from scans import OPTIONS, inputs, options_of, reference

import hf_glu
from hf_glu import cli
from hf_glu.activation.kernels.scan.traced import traced
from hf_glu.checkpoint.files import EXPORT_FILE
from hf_glu.checkpoint.loading import load_model
from hf_glu.errors import CheckpointError, ConversionError, MissingPackageError, NoSiteError, OptionError
from hf_glu.instruments.probe import run
from hf_glu.publishing import export as exporting
from hf_glu.publishing.export import export, folding, graphs
from hf_glu.publishing.export.samples import distances, expected_outputs, sample

CLASSIFIER = "BertForSequenceClassification"
IDS = torch.randint(3, VOCAB, (40, 16), generator=torch.Generator().manual_seed(0))
# what starts without effect, or alike in all experts: it must not when it is exported
ASLEEP = ("mix", "choice", "threshold", "slope", "alpha", "beta", "router", "in_proj")

LAYERS = {"bert": "num_hidden_layers", "gpt2": "n_layer", "t5": "num_layers", "opt": "num_hidden_layers"}


def awake(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name.split(".")[-1] or part in name.split(".") for part in ASLEEP):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def converted(family, head, to, **more):
    model = FAMILIES[family].make(head, **{LAYERS[family]: 1})
    hf_glu.convert(model, to, check=False, **more)
    return awake(model)


def gated(**more):
    return converted("bert", CLASSIFIER, "geglu", **more)


def experts(groups):
    return lambda: converted("bert", CLASSIFIER, "geglu", experts=groups, top_k=2)


def mixed_bank():
    options = {"version": 1, "experts": {"groups": "silu*1,relu*1"}}
    return awake(make_native("mixtral", num_hidden_layers=1, hf_glu=options))


MODELS = {
    **{name: lambda name=name: converted("bert", CLASSIFIER, name) for name in (
        "geglu", "learnable_geglu", "moa_geglu", "modulated_geglu", "stateful_geglu", "modulated_stateful_moa_geglu",
    )},
    **{f"gpt2, {name}": lambda name=name: converted("gpt2", "GPT2LMHeadModel", name) for name in (
        "geglu_new", "learnable_geglu_new", "modulated_geglu_new", "stateful_geglu_new",
    )},
    "experts": experts("geglu*2,gelu*2,swiglu*2"),
    "alike experts": experts("geglu*4"),
    "experts that read": experts("stateful_geglu*2,modulated_geglu*2"),
    "t5": lambda: converted("t5", "T5ForConditionalGeneration", "modulated_reglu"),
    "opt, rows of tokens": lambda: converted("opt", "OPTForCausalLM", "stateful_reglu"),
    "llama": lambda: awake(make_native("llama", num_hidden_layers=1, hidden_act="stateful_learnable_silu")),
    "mixtral": mixed_bank,
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    def save(model, name="model"):
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: "-".join(key for key, on in case.items() if on) or "plain")
def test_the_traced_recurrence(case):
    gate, alpha, beta, decay, start = inputs()
    options = options_of(case, start)
    expected = reference(gate, alpha, beta, decay, **options)
    restart = options.pop("restart")
    if restart is not None and case["reverse"]:
        restart = torch.cat([restart[:, 1:], torch.zeros_like(restart[:, :1])], dim=1)
    for found, wanted in zip(traced(gate, alpha, beta, decay, restart=restart, **options), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8, 9, 64])
def test_enough_doublings(tokens):
    gate, alpha, beta, decay, start = inputs(tokens, decay=0.999)
    expected = reference(gate, alpha, beta, decay, start=start)
    found = traced(gate, alpha, beta, decay, start, None, None, False)
    assert_same(dict(enumerate(found)), dict(enumerate(expected)), "formula")


@pytest.mark.parametrize("name", [name for name in MODELS if "expert" in name or name in ("mixtral", "moa_geglu")])
def test_what_is_traced_computes_the_same(name, monkeypatch):
    model = MODELS[name]()
    batch = sample(model, 3, 11)
    before = run(model, batch)
    with monkeypatch.context() as tracing:
        tracing.setattr("hf_glu.ffn.experts.ffn.is_traced", lambda: True)
        tracing.setattr("hf_glu.ffn.experts.native.is_traced", lambda: True)
        assert_same(run(model, batch), before, "exact up to rounding")
    assert_same(run(model, batch), before, "bitwise")


def test_samples_are_told_apart():
    """Padding, token types and the decoder's own length are there, and count."""
    model = converted("bert", CLASSIFIER, "modulated_geglu")
    batch = sample(model, 3, 11)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    assert batch["attention_mask"].sum() == 31
    assert batch["token_type_ids"].unique().tolist() == [0, 1]
    for name in ("attention_mask", "token_type_ids"):
        other = {**batch, name: torch.ones_like(batch[name])}
        assert (run(model, other)["logits"] - run(model, batch)["logits"]).abs().max() > 1e-6
    seq2seq = sample(FAMILIES["bart"].make(), 2, 9)
    assert seq2seq["decoder_input_ids"].shape == (2, 5)
    assert "decoder_input_ids" not in sample(FAMILIES["bart"].make("BartForSequenceClassification"), 2, 9)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "program"])
def test_a_graph_by_the_library(format, saved, tmp_path):
    source = saved(FAMILIES["bert"].make(CLASSIFIER, num_hidden_layers=1, hidden_act="moa_geglu"))
    (source / "vocab.txt").write_text("kept\n")
    result = export(source, tmp_path / "out", format=format)
    assert result.same
    assert set(result.differences) == {"1 x 7 tokens", "3 x 19 tokens"}
    assert max(result.differences.values()) < 1e-6
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"onnx": "model.onnx", "program": "model.pt2"}[format] in written
    assert {"vocab.txt", "config.json", "export.json", EXPORT_FILE} <= written
    assert "model.safetensors" not in written
    noted = json.loads((tmp_path / "out" / EXPORT_FILE).read_text())
    assert noted == json.loads(json.dumps(result.to_dict()))


def installed(kind):
    """Skip what needs a runtime that the tests' environment doesn't bring along."""
    for package in graphs.RUNTIMES[kind].packages:
        pytest.importorskip(package)
    return kind


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), list(product(MODELS, graphs.RUNTIMES)))
def test_graphs_of_every_kind(name, kind, tmp_path):
    installed(kind)
    model = MODELS[name]()
    graphs.write_graph(model, kind, tmp_path)
    expected, found = expected_outputs(model), graphs.graph_outputs(model, tmp_path)
    assert max(distances(expected, found).values()) < 2e-6


_FRESH = """
import sys
import torch
from transformers.exporters.base import ExportedModel
inputs = torch.load(sys.argv[1])
torch.save(dict(ExportedModel.from_pretrained(sys.argv[2])(**inputs)), sys.argv[1])
assert not any(name.startswith("hf_glu") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", graphs.RUNTIMES)
def test_graphs_run_where_hf_glu_is_not_loaded(kind, saved, tmp_path):
    model = converted("bert", CLASSIFIER, "modulated_stateful_moa_geglu")
    export(saved(model), tmp_path / "graph", format=installed(kind))
    batch = sample(model, 4, 13)
    torch.save(batch, tmp_path / "batch")
    done = fresh_process(_FRESH, str(tmp_path / "batch"), str(tmp_path / "graph"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same({"logits": torch.load(tmp_path / "batch")["logits"]}, outputs(model, **batch), "exact")


@pytest.mark.slow
def test_a_graph_that_computes_something_else_isnt_left(saved, tmp_path, monkeypatch):
    source = saved(gated())
    with pytest.raises(OptionError, match="did you mean 'onnx'"):
        export(source, tmp_path / "out", format="onx")
    with pytest.raises(CheckpointError, match="choose another"):
        export(source, source)

    def other(model, kind, folder):
        graphs.write_graph(gated(), kind, folder)
        model.classifier.bias.data += 0.01

    monkeypatch.setattr(exporting, "write_graph", other)
    with pytest.raises(ConversionError, match=r"differ by 1\.0e-02, more than 0\.0001"):
        export(source, tmp_path / "out", format="program")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_no_graph_is_made_of(saved, tmp_path, monkeypatch):
    installed("onnx")
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, hidden_act="reglu")
    source = saved(transformers.MambaForCausalLM(config))
    with pytest.raises(ConversionError, match="state-space model"):
        export(source, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingPackageError, match=r'onnx needs onnxscript, .*: pip install "hf_glu\[export\]"'):
        export(source, tmp_path / "out")
    monkeypatch.undo()

    def refuse(*args):
        raise RuntimeError("\nthe tracer's own words\nand more")

    monkeypatch.setattr(graphs, "_trace", refuse)
    with pytest.raises(ConversionError, match=r"BertForSequenceClassification can't be .* the tracer's own words$"):
        export(saved(gated(), "bert"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def stock_equal(source, tmp_path, tolerance):
    """Export, and return the model that Transformers without hf_glu loads, compared with the one before."""
    model = load_model(source)
    result = export(source, tmp_path / "stock", format="native")
    with folding.unplugged():
        assert not hf_glu.is_registered()
        stock, info = type(model).from_pretrained(tmp_path / "stock", output_loading_info=True)
        assert not any(info.values())
        assert_same(outputs(stock), outputs(model), tolerance)
    assert hf_glu.is_registered()
    assert not any(type(module).__module__.startswith("hf_glu") for module in stock.modules())
    assert "hf_glu" not in (tmp_path / "stock" / "config.json").read_text()
    return stock, result


def test_t5_as_v1_1(saved, tmp_path):
    model = FAMILIES["t5"].make()
    tokens = torch.randint(2, VOCAB, (64, 12), generator=torch.Generator().manual_seed(0))
    hf_glu.convert(model, "swiglu", calibration=tokens, bias=False, distill_steps=0)
    stock, result = stock_equal(saved(model), tmp_path, "exact")
    assert stock.config.feed_forward_proj == "gated-silu"
    assert result.note == "stock T5ForConditionalGeneration, feed_forward_proj=gated-silu"


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_an_untouched_conversion_is_dense_again(family, saved, tmp_path):
    model = FAMILIES[family].make()
    dense = outputs(model)
    hf_glu.convert(model, FAMILIES[family].exact)
    stock, _ = stock_equal(saved(model), tmp_path, "exact")
    assert_same(outputs(stock), dense, "bitwise")


@pytest.mark.parametrize(
    ("name", "act", "plain"),
    [
        ("llama", "modulated_stateful_gelu", "gelu"), ("llama", "learnable_silu", "silu"),
        ("llama", "moa_relu", "relu"), ("phi3", "stateful_learnable_silu", "silu"),
        ("modernbert", "stateful_gelu", "gelu"),
    ],
)  # fmt: skip
def test_natively_gated_families(name, act, plain, saved, tmp_path):
    field = "hidden_activation" if name == "modernbert" else "hidden_act"
    model = make_native(name, **{field: act})
    if "learnable" in act or "moa" in act:
        for parameter in (part for part in model.parameters() if part.shape == (4,)):
            parameter.data += 0.2
        with pytest.raises(ConversionError, match="anneal"):
            export(saved(model, "alive"), tmp_path / "stock", format="native")
        hf_glu.anneal(model, 1.0)
    stock, _ = stock_equal(saved(model), tmp_path, "exact")
    assert getattr(stock.config, field) == plain


@pytest.mark.parametrize(("act", "read"), [("gelu", "geglu"), ("stateful_silu", "swiglu"), ("relu", "reglu")])
def test_what_llama_cpp_reads_of_modernbert(act, read, saved, tmp_path):
    source = saved(make_native("modernbert", hidden_activation=act))
    result = export(source, tmp_path / "gguf", format="gguf")
    assert result.same
    assert json.loads((tmp_path / "gguf" / "config.json").read_text())["hidden_activation"] == read
    assert_same(outputs(load_model(tmp_path / "gguf")), outputs(load_model(source)), "exact")


@pytest.mark.parametrize(
    ("name", "field", "act", "says"),
    [
        ("modernbert", "hidden_activation", "mish", "doesn't know for GeGLU, .* has mish"),
        ("llama", "hidden_act", "relu", "every llama for silu.* this one has relu"),
        ("llama", "hidden_act", "stateful_gelu", "every llama for silu.* this one has gelu"),
    ],
)
def test_what_llama_cpp_would_misread(name, field, act, says, saved, tmp_path):
    source = saved(make_native(name, **{field: act}))
    with pytest.raises(ConversionError, match=says):
        export(source, tmp_path / "gguf", format="gguf")
    assert not (tmp_path / "gguf").exists()
    with pytest.raises(ConversionError, match="leaves small entries out"):
        export(saved(sparse(), "sparse"), tmp_path / "gguf", format="gguf")
    export(saved(make_native("llama"), "silu"), tmp_path / "gguf", format="gguf")


def trained_wrapper():
    return awake(make_native("llama", hidden_act="stateful_silu"))


def trained_dense():
    return converted("bert", CLASSIFIER, "stateful_geglu")


def by_layer():
    return make_native("llama", hidden_act="stateful_silu", hf_glu={"version": 1, "by_layer": {"0": "stateful_relu"}})


def sparse():
    model = make_native("llama")
    hf_glu.sparsify(model, IDS)
    return model


@pytest.mark.parametrize(
    ("says", "error", "make"),
    [
        ("leaves small entries out", ConversionError, sparse),
        ("was trained.*export it as onnx", ConversionError, trained_dense),
        ("learned to depend on the text", ConversionError, trained_wrapper),
        ("different activations, relu, silu", ConversionError, by_layer),
        ("experts of hf_glu's", ConversionError, experts("geglu*4")),
        ("experts of hf_glu's", ConversionError, mixed_bank),
        ("stock already", NoSiteError, lambda: make_native("llama")),
        ("stock already", NoSiteError, lambda: FAMILIES["bert"].make()),
    ],
)  # fmt: skip
def test_what_folds_into_nothing(says, error, make, saved, tmp_path):
    source = saved(make())
    with pytest.raises(error, match=says):
        export(source, tmp_path / "out", format="native")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert hf_glu.is_registered()


@pytest.mark.slow
def test_the_command(saved, tmp_path, capsys):
    source = saved(converted("gpt2", "GPT2LMHeadModel", "geglu_new"))
    assert cli.run(["export", str(source), str(tmp_path / "out"), "--native", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["same"]
    assert data["note"] == "stock GPT2LMHeadModel, activation_function=gelu_new"
    assert cli.run(["export", str(source), str(tmp_path / "two"), "--native", "--onnx"]) == 2
    assert "one format at a time, got --onnx and --native" in capsys.readouterr().err
    assert cli.run(["export", str(source), str(tmp_path / "p"), "--program", "--tolerance", "-1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("hf-glu: the program of")
    assert cli.run(["export", str(source), str(tmp_path / "p"), "--program"]) == 0
    shown = capsys.readouterr().out
    assert "model.pt2" in shown
    assert "3 x 19 tokens" in shown
