"""The notebooks of docs/: each runs from its file, offline, with pico models in the place of pretrained ones.

What stands behind the cell that is tagged ``parameters`` are the test's values, as papermill would have them.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import FAMILIES
from taskdata import save_base, sentence
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
import nbformat  # noqa: E402
from jupyter_client import KernelManager  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))}
PARAMETERS = "parameters"


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def parameters_cell(notebook: Any) -> int:
    """Return where the cell is whose values may be changed."""
    (place,) = [at for at, cell in enumerate(notebook.cells) if PARAMETERS in cell.metadata.get("tags", ())]
    return place


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for all notebooks, each of which begins without names: what they import takes ten seconds."""
    manager = KernelManager(kernel_name="python3")
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    manager.start_kernel(env=os.environ | environment, cwd=str(tmp_path_factory.mktemp("kernel")))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.fixture
def run(kernel, tmp_path):
    """Execute a notebook, with other values of its parameters; what expressions in its names give in the end."""

    def runs(name: str, parameters: dict[str, Any], asked: dict[str, str]) -> dict[str, Any]:
        notebook = read(name)
        place = parameters_cell(notebook)
        assigned = {target.id for node in ast.parse(notebook.cells[place].source).body for target in node.targets}
        assert parameters.keys() <= assigned
        given = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        entries = ", ".join(f"{key!r}: {expression}" for key, expression in asked.items())
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(given))
        notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({{{entries}}}))"))
        begin = f"%reset -f\n%cd -q {tmp_path}"
        notebook.cells.insert(0, nbformat.v4.new_code_cell(begin))
        client = nbclient.NotebookClient(notebook, km=kernel, timeout=300)
        try:
            client.execute()
        finally:
            client.kc.stop_channels()
        return json.loads(notebook.cells[-1].outputs[-1].text)

    return runs


def save_gpt2(folder: Path, name: str) -> str:
    """Save a pico GPT-2, loud enough to tell texts apart, whose tokenizer knows the words of a notebook."""
    words = dict.fromkeys(re.findall(r"\w+|[^\w\s]+", "\n".join(cell.source for cell in read(name).cells)))
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[EOS]", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[EOS]").save_pretrained(folder)
    model = FAMILIES["gpt2"].make(vocab_size=len(vocabulary))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_valid_and_say_what_is_to_be_seen(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# ")
    place = parameters_cell(notebook)
    assert "MODEL = " in notebook.cells[place].source
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", cell.source
            assert cell.execution_count is None
            assert not cell.outputs, "results of one machine"


@pytest.mark.slow
def test_bert_is_converted_and_fine_tuned(run, tmp_path):
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "data").mkdir()
    for split, count in (("train", 320), ("validation", 64)):
        rows = [{"sentence": sentence(generator, at % 2), "label": at % 2} for at in range(count)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parameters = {"MODEL": save_base(tmp_path / "bert"), "DATA": str(tmp_path / "data"), "RATE": 1e-2}
    asked = {
        "scores": "scores",
        "difference": "[difference, report.max_abs_difference]",
        "up": "halves['up'].tolist()",
        "loaded": "[same, again.config.hidden_act, type(again).__name__]",
    }
    found = run("convert", parameters, asked)
    dense, gated = found["scores"]["dense"], found["scores"]["geglu"]
    assert dense["before"] == gated["before"] < 0.7
    assert min(dense["after"], gated["after"]) > 0.9
    assert max(found["difference"]) < 1e-6
    assert len(found["up"]) == 2
    assert min(found["up"]) > 1e-4
    assert found["loaded"] == [True, "geglu", "BertForSequenceClassification"]


@pytest.mark.slow
def test_gpt2_remembers(run, tmp_path):
    asked = {
        "difference": "report.max_abs_difference",
        "asleep": "[list(openness.shape), float(middle.openness.min()), float(middle.shift.abs().max())]",
        "awake": "[list(gates.shift.shape), float(gates.shift.amin())]",
        "read": "[len(ids[0]), len(made[0])]",
        "perplexities": "table.to_dict()",
        "apart": "apart",
        "same": "same",
    }
    found = run("memory", {"MODEL": save_gpt2(tmp_path / "gpt2", "memory"), "STEPS": 5}, asked)
    assert found["difference"] < 1e-5
    prompt, whole = found["read"]
    assert whole == prompt + 12
    shape, least, moved = found["asleep"]
    assert shape == [prompt, 2]
    assert 0 < least < 1
    assert moved == 0
    shape, least = found["awake"]
    assert shape == [2, 1, whole - 1]
    assert least > 0
    before, after = found["perplexities"]["before"], found["perplexities"]["after"]
    assert after["trained on"] < before["trained on"]
    assert all(map(math.isfinite, (*before.values(), *after.values())))
    assert max(found["apart"]) < 1e-4
    assert found["same"]


@pytest.mark.slow
def test_gates_are_steered(run, tmp_path):
    asked = {
        "prefers": "doses['prefers glad'].tolist()",
        "perplexity": "doses['perplexity'].tolist()",
        "written": "list(made.shape)",
        "accuracy": "dict(glad.accuracy)",
        "folded": "[to_steered, to_plain]",
        "same": "same",
    }
    found = run("steering", {"MODEL": save_gpt2(tmp_path / "gpt2", "steering")}, asked)
    assert len(found["prefers"]) == found["written"][0] == 5
    assert len({*found["prefers"]}) == 5, "a random model's mood is no one's, but each dose moves it"
    assert all(map(math.isfinite, found["perplexity"]))
    assert found["accuracy"].keys() == {"layers.0", "layers.1"}
    to_steered, to_plain = found["folded"]
    assert max(1e-5, 100 * to_steered) < to_plain
    assert found["same"]
