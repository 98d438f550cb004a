"""``hf-glu sparsify``, and the bench of a sparse model: a folder that loads sparse, what it costs, what is refused."""

from __future__ import annotations

import json

import pytest
import transformers
from pico import make_native
from taskdata import make_tokenizer

from hf_glu import cli
from hf_glu.bench import sparsity
from hf_glu.bench.running import BenchOptions
from hf_glu.ffn.sparse_linear import SparseLinear

WORDS = ["*", "#", "by", "odd", "the"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a tiny language model, and files of text."""
    root = tmp_path_factory.mktemp("sparse")
    tokenizer = make_tokenizer()
    make_native("llama", vocab_size=len(tokenizer), max_position_embeddings=600).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    lines = [" ".join(WORDS[(i * j) % 5] for j in range(99)) for i in range(60)]
    (root / "texts.txt").write_text("\n".join(lines) + "\n")
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return root


def test_the_folder_loads_sparse_and_the_report_says_what_it_costs(folder, tmp_path, capsys):
    command = ["sparsify", str(folder / "model"), str(tmp_path / "new"), "--calibration", str(folder / "texts.txt")]
    assert cli.run([*command, "--keep", "0.6", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["read"] == pytest.approx(0.6)
    assert said["perplexity"]["tokens"] > 100
    assert said["perplexity"]["after"] != said["perplexity"]["before"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == 6
    assert json.loads((tmp_path / "new" / "hf_glu_report.json").read_text())["sparsity"] == said
    card = (tmp_path / "new" / "README.md").read_text()
    assert "leave small entries out" in card
    assert "import hf_glu" in card
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "new").get_vocab() == make_tokenizer().get_vocab()


def test_a_person_sees_a_table(folder, tmp_path, capsys):
    texts = str(folder / "texts.txt")
    assert cli.run(["sparsify", str(folder / "model"), str(tmp_path / "new"), "--calibration", texts]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown
    assert "70% of the FFNs' weights" in shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--keep", "0"], "above 0"),
        (["--keep", "1"], "nothing out"),
        (["--method", "tael"], "teal"),
        (["--layers", "x"], "layers"),
        (["--method", "spark", "--keep", "0.5"], "at least"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(folder, given, message, tmp_path, capsys):
    command = ["sparsify", str(folder / "model"), str(tmp_path / "new"), "--calibration", str(folder / "texts.txt")]
    assert cli.run([*command, *given]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_bench_decodes_at_each_share(folder, capsys):
    options = ["--model", str(folder / "model"), "--text", str(folder / "texts.jsonl"), "--tokens", "512,512"]
    assert cli.run(["bench", "sparsity", *options, "--rounds", "2", "--warmup", "1", "--threads", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["contender"] for row in rows] == ["dense", "70% kept", "50% kept", "30% kept"]
    assert [row["facts"]["read"] for row in rows] == pytest.approx([1, 0.7, 0.5, 0.3])
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert rows[0]["facts"]["of dense"] == 1 != rows[3]["facts"]["of dense"]
    assert cli.run(["bench", "sparsity", "--model", str(folder / "model")]) == 2
    assert "--text" in capsys.readouterr().err


def test_without_a_model_the_bench_is_of_relu_gates():
    (first, *_) = sparsity.cells(BenchOptions(hidden=8, width=16))
    assert first.shape["of"] == "reglu FFN"
