"""``hf-glu merge``: folders into one, whole or not at all, with a card that names all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from comparing import assert_same, outputs
from huggingface_hub import ModelCard
from pico import FAMILIES
from taskdata import make_tokenizer

import hf_glu
from hf_glu import cli
from hf_glu.cli.merging import split_prompts
from hf_glu.ffn.experts import find_experts


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return three folders with fine-tunes, and three files of prompts."""
    root, tokenizer = tmp_path_factory.mktemp("merge"), make_tokenizer()
    paths = [root / name for name in ("law", "medicine", "sport")]
    for seed, path in enumerate(paths):
        FAMILIES["bert"].make(seed=seed, vocab_size=len(tokenizer)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        (root / f"{path.name}.txt").write_text(f"some words of {path.name}\nand more of them\n")
    return paths, [path.with_suffix(".txt") for path in paths]


@pytest.mark.parametrize("again", [False, True])
def test_three_folders_become_one(folders, again, tmp_path, capsys):
    paths, files = ([str(path) for path in each] for each in folders)
    prompts = [part for file in files for part in ("--prompts", file)] if again else ["--prompts", *files]
    command = ["merge", *paths, "--output", str(tmp_path / "mixed"), "--router", "hidden", *prompts]
    assert cli.run([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["promise"] == "approximate"
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "mixed")
    models = [transformers.AutoModelForMaskedLM.from_pretrained(path) for path in paths]
    texts = [Path(file).read_text().splitlines() for file in files]
    wanted = hf_glu.merge_experts(models, router="hidden", prompts=texts, tokenizer=make_tokenizer())
    assert_same(outputs(model), outputs(wanted.eval()), "bitwise")
    assert model.config.hf_glu["experts"]["sources"] == ["law", "medicine", "sport"]
    assert json.loads((tmp_path / "mixed" / "hf_glu_report.json").read_text())["merged"][2]["name"] == "sport"
    card = (tmp_path / "mixed" / "README.md").read_text()
    assert "A mixture of `law`, `medicine` and `sport`, whose feed-forward networks, one model's each, became" in card
    assert "all that is no FFN is averaged" in card
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "mixed").get_vocab() == make_tokenizer().get_vocab()


def test_the_hub_is_told_that_it_is_a_merge(folders, tmp_path):
    paths, _ = folders
    assert cli.run(["merge", *map(str, paths[:2]), "--output", str(tmp_path / "mixed"), "--attention", "first"]) == 0
    report = json.loads((tmp_path / "mixed" / "hf_glu_report.json").read_text())
    for each, name in zip((report["base"], *report["merged"]), ("me/a", "me/a", "me/b"), strict=True):
        each.update(name=name, repository=True)
    (tmp_path / "mixed" / "hf_glu_report.json").write_text(json.dumps(report))
    from hf_glu.publishing.card.card import describe

    data = ModelCard(describe(tmp_path / "mixed")).data
    assert data.base_model == ["me/a", "me/b"]
    assert data.base_model_relation == "merge"


def test_folders_of_the_same_model_give_its_outputs(folders, tmp_path, capsys):
    source = str(folders[0][0])
    assert cli.run(["merge", source, source, "--output", str(tmp_path / "mixed"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["promise"] == "exact"
    assert said["max_abs_difference"] <= 1e-6
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "mixed")
    before = outputs(transformers.AutoModelForMaskedLM.from_pretrained(source))
    assert_same(outputs(model), before, "exact up to rounding")
    assert len(find_experts(model)) == 2


BAD = {
    "one": (["A"], "two models at least, got 1"),
    "no prompts": (["A", "B", "--router", "hidden"], "--router hidden needs --prompts"),
    "useless prompts": (["A", "B", "--prompts", "F", "F"], "--router random reads no --prompts"),
    "too few": (["A", "B", "--router", "hidden", "--prompts", "F"], "a file of prompts for each model, got 3"),
    "no file": (["A", "B", "--router", "hidden", "--prompts", "F", "gone.txt"], "gone.txt can't be read"),
    "no folder": (["A", "nowhere"], "nowhere"),
    "router": (["A", "B", "--router", "best"], "router must be one of random, hidden"),
    "attention": (["A", "B", "--attention", "none"], "attention must be one of average, first"),
    "top k": (["A", "B", "--top-k", "3"], "--top-k must be 1 to 2"),
    "shapes": (["A", "WIDE"], "model 2 has intermediate_size 48, and the first 40"),
    "vocabulary": (["A", "OTHER"], "model 2 has another vocabulary than the first"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, folders, tmp_path, capsys):
    (first, second, _), (file, *_) = folders
    arguments, says = BAD[case]
    tokenizer = make_tokenizer()
    if "WIDE" in arguments:
        FAMILIES["bert"].make(vocab_size=len(tokenizer), intermediate_size=48).save_pretrained(tmp_path / "wide")
    if "OTHER" in arguments:
        FAMILIES["bert"].make(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "other")
        tokenizer.add_tokens(["brandnew"])
        tokenizer.save_pretrained(tmp_path / "other")
    places = {"A": first, "B": second, "F": file, "WIDE": tmp_path / "wide", "OTHER": tmp_path / "other"}
    given = [str(places.get(part, part)) for part in arguments]
    assert cli.run(["merge", *given, "--output", str(tmp_path / "mixed")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("hf-glu: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "mixed").exists()
    assert not list(tmp_path.glob(".hf_glu-partial-*"))


def test_files_of_prompts_are_told_from_models():
    assert split_prompts(["a", "b"], []) == (["a", "b"], [])
    models, files = split_prompts(["a", "b", "y"], ["x"])
    assert (models, [str(file) for file in files]) == (["a", "b"], ["x", "y"])
    assert split_prompts(["a", "b", "c", "y", "z"], ["x"])[0] == ["a", "b", "c"]
