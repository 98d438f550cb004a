"""``hf-glu convert --grow``: a folder with more experts, whole or not at all, and what its card says."""

from __future__ import annotations

import json

import pytest
import transformers
from comparing import assert_same, outputs
from pico import FAMILIES, make_native
from taskdata import make_tokenizer

import hf_glu
from hf_glu import cli


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """Return a folder with a Mixtral, its tokenizer, and a file of texts."""
    folder, tokenizer = tmp_path_factory.mktemp("grow") / "mixtral", make_tokenizer()
    make_native("mixtral", vocab_size=len(tokenizer), num_local_experts=4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    folder.with_suffix(".txt").write_text("some words that nobody reads\nand others\n")
    return folder


@pytest.mark.parametrize("active", ["one", "all"])
def test_a_mixtral_grows(active, mixtral, tmp_path, capsys):
    texts = ["--calibration", str(mixtral.with_suffix(".txt"))] if active == "one" else ["--active", "all"]
    command = ["convert", str(mixtral), str(tmp_path / "grown"), "--grow", "3", *texts, "--json"]
    assert cli.run(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["promise"] == ("exact" if active == "one" else "exact up to rounding")
    assert said["max_abs_difference"] <= 1e-6
    grown, old = (transformers.MixtralForCausalLM.from_pretrained(path) for path in (tmp_path / "grown", mixtral))
    assert_same(outputs(grown), outputs(old), "exact up to rounding")
    assert len(grown.model.layers[0].mlp.experts.down_proj) == 12
    card = (tmp_path / "grown" / "README.md").read_text()
    used = "one of which a token uses" if active == "one" else "all of which a token uses"
    assert f"whose experts, `silu*4` before, were copied: 3 copies of each expert, {used}" in card
    assert ("It is a stock Transformers model" in card) == (active == "all")
    if active == "all":
        assert "3 times their FLOPs" in card


def test_experts_of_ours_grow(tmp_path, capsys):
    model = FAMILIES["bert"].make()
    hf_glu.convert(model, "geglu", experts=2)
    model.save_pretrained(tmp_path / "experts")
    assert cli.run(["convert", str(tmp_path / "experts"), str(tmp_path / "grown"), "--grow", "2"]) == 0
    assert "2 copies of each expert" in capsys.readouterr().out
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "grown")
    assert_same(outputs(again), outputs(model), "exact up to rounding")
    assert again.config.hf_glu["experts"] == {"groups": "geglu*4", "copies": 2}
    assert again.config.num_experts == 4


BAD = {
    "one copy": (["--grow", "1"], "times must be a number of copies, 2 to"),
    "active alone": (["--active", "all"], "needs --to NAME"),
    "active with others": (["--to", "geglu", "--active", "all"], "give --grow, too"),
    "active": (["--grow", "2", "--active", "two"], "active must be one of one, all, got 'two'"),
    "others": (["--grow", "2", "--to", "geglu", "--layers", "0"], "leave --to and --layers out"),
    "stream": (["--grow", "2", "--stream"], "leave --stream out"),
    "split": (["--grow", "2", "--split", "2+2", "--top-k", "2", "--calibration", "TEXTS"], "leave --split and --top-k"),
    "calibration": (["--grow", "2", "--active", "all", "--calibration", "TEXTS"], "leave --calibration out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, mixtral, tmp_path, capsys):
    arguments, says = BAD[case]
    given = [str(mixtral.with_suffix(".txt")) if part == "TEXTS" else part for part in arguments]
    assert cli.run(["convert", str(mixtral), str(tmp_path / "grown"), *given]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_dense_folder_has_nothing_to_grow(tmp_path, capsys):
    FAMILIES["bert"].make().save_pretrained(tmp_path / "dense")
    assert cli.run(["convert", str(tmp_path / "dense"), str(tmp_path / "grown"), "--grow", "2"]) == 2
    assert "BertForMaskedLM has no experts to grow: hf_glu.convert(model, NAME, experts=...)" in capsys.readouterr().err
    assert not (tmp_path / "grown").exists()
