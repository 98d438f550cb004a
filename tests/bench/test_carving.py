"""The bench of dividing FFNs: CMoE and the limit leave a model as it is where all is on, its cells, bad input."""

from __future__ import annotations

import json

import pytest
import torch
from comparing import assert_same, outputs
from pico import FAMILIES, VOCAB, make_native
from taskdata import make_tokenizer

from hf_glu import cli
from hf_glu.bench.cmoe import SwitchedFFN, cmoe, limit
from hf_glu.errors import OptionError

IDS = torch.randint(3, VOCAB, (8, 16), generator=torch.Generator().manual_seed(0))


def llama():
    return make_native("llama", intermediate_size=64)


@pytest.mark.parametrize("make", [llama, FAMILIES["gpt2"].make], ids=["gated", "dense"])
def test_with_all_on_they_are_the_dense_model(make):
    model = make()
    parts = 16 if make is llama else 8
    before = outputs(model)
    cmoe(model, [{"input_ids": IDS}], (2, parts - 2), parts - 2)
    assert sum(isinstance(module, SwitchedFFN) for module in model.modules()) == 2
    assert_same(outputs(model), before, "exact up to rounding")
    model = make()
    limit(model, 1.0)
    assert_same(outputs(model), before, "exact up to rounding")


def test_cmoe_leaves_so_many_units_on_and_the_limit_is_nearer():
    def switched(change):
        model, seen = llama(), []
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.data *= 20
        before = outputs(model)["logits"]
        change(model)
        ffn = model.model.layers[0].mlp
        ffn.inner.down_proj.register_forward_pre_hook(lambda module, args: seen.append((args[0] != 0).sum(-1)))
        error = float((outputs(model)["logits"] - before).norm())
        return error, {int(count) for count in seen[0].flatten()}

    theirs, counts = switched(lambda model: cmoe(model, [{"input_ids": IDS}], (2, 14), 6))
    assert counts == {32}
    best, counts = switched(lambda model: limit(model, 0.5))
    assert counts == {32}
    assert 0 < best < theirs


def test_families_whose_ffns_are_no_modules_are_refused():
    with pytest.raises(OptionError, match="BertForMaskedLM isn't"):
        limit(FAMILIES["bert"].make(), 0.5)


@pytest.mark.slow
def test_the_bench_measures_each_share(tmp_path, capsys):
    llama().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "text.jsonl").write_text(
        "".join(
            json.dumps({"text": " ".join(["*", "#", "by", "odd"][(i * j) % 4] for j in range(99))}) + "\n"
            for i in range(60)
        )
    )
    options = ["--model", str(tmp_path), "--text", str(tmp_path / "text.jsonl"), "--tokens", "1024,1024"]
    assert cli.run(["bench", "carving", *options, "--rounds", "1", "--warmup", "1", "--threads", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["contender"] for row in rows] == ["dense", "ours", "CMoE", "limit"] * 3
    assert [row["cell"]["active"] for row in rows[::4]] == [0.75, 0.5, 0.25]
    assert all(row["facts"]["perplexity"] > 1 for row in rows)
    assert {row["facts"]["of dense"] for row in rows[::4]} == {1.0}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "needs --model"),
        (["--model", "MODEL"], "--text"),
        (["--model", "MODEL", "--text", "TEXT"], "too few tokens"),
    ],
)
def test_bad_input_of_the_bench_is_one_line(more, says, tmp_path, capsys):
    llama().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("by the\n" * 300)
    paths = {"MODEL": str(tmp_path), "TEXT": str(tmp_path / "text.txt")}
    assert cli.run(["bench", "carving", *[paths.get(word, word) for word in more]]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-glu: ")]
    assert says in line
