"""The two-domain recipe, from end to end on made-up sentences, and its pieces against plain reckoning."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import domains
import pytest
import torch
from rich.console import Console
from typer import Exit

from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.experts.group import banks_of
from hf_glu.instruments.routing import active_parameters
from hf_glu.tasks import movies

WORDS = {"films": "a film scene actor plot dull funny charming".split(), "editorials": "the tax vote court law".split()}
SIZES = SimpleNamespace(**domains.SIZES | domains.QUICK | {"sentences": 40})


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Put files in the cache as pip would; nothing may be fetched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(movies, "SHA256", {})  # of the real files
    monkeypatch.setattr(movies.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    draw = random.Random(0)
    for domain, name in domains.DOMAINS.items():
        texts = [" ".join(draw.choices(WORDS[domain], k=draw.randint(3, 12))) for _ in range(60)]
        lines = [f"{number}\t{0.5}\t{text}" for number, text in enumerate([*texts, texts[0], f"{texts[1]} "])]
        path = movies._cache_folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.usefixtures("archive")
def test_sentences_are_split_once_and_never_in_both():
    splits = domains.read_domains(None)
    for domain in domains.DOMAINS:
        train, validation = (splits[split][domain] for split in ("train", "validation"))
        assert (len(train), len(validation)) == (len({*train, *validation}) - len(validation), len(set(validation)))
        assert len(validation) == (len(train) + len(validation)) // 10
        assert {word for text in train for word in text.split()} == set(WORDS[domain])
    assert domains.read_domains(None) == splits


def test_active_parameters_are_equal_but_for_biases():
    active = {}
    for name, groups in domains.GROUPS.items():
        sizes = SimpleNamespace(**domains.SIZES)
        model = domains.make_model(groups.format(plain=192, gated=128), sizes, 0)
        active[name] = active_parameters(model)
        banks = [bank for ffn in find_experts(model).values() for bank in banks_of(ffn.banks)]
        assert len({(b.in_proj[0].numel() + b.out_proj[0].numel()) for b in banks}) == 1
        assert len(find_experts(model)) == sizes.layers
    assert max(active.values()) <= 1.001 * min(active.values())


def test_a_batch_has_padding_that_counts_nowhere():
    batch = domains.make_batch([[1, 5, 6, 1], [1, 1]])
    assert batch["input_ids"].tolist() == [[1, 5, 6, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 5, 6, 1], [1, 1, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_the_loss_is_the_mean_of_all_tokens_and_loads_leave_padding_out():
    model = domains.make_model("relu*2,swiglu*2", SIZES, 0).eval()
    draw = random.Random(1)
    validation = {
        domain: [[1, *(draw.randrange(2, 300) for _ in range(length)), 1] for length in (3, 9, 4, 17, 2)]
        for domain in domains.DOMAINS
    }
    found = domains.evaluate(model, validation, batch_size=2)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in [row for rows in validation.values() for row in rows]:
            ids = torch.tensor([row])
            total += float(model(input_ids=ids, labels=ids).loss) * (len(row) - 1)
            tokens += len(row) - 1
    assert found["loss"]["all"] == pytest.approx(total / tokens, rel=1e-5)
    for row in found["experts"]:
        assert row["tokens"] == sum(map(len, validation[row["label"]]))
        assert sum(row["load"]) == pytest.approx(1)
    films, editorials = (torch.tensor([row["load"] for row in found["experts"] if row["label"] == d]) for d in WORDS)
    apart = (films - editorials).abs().sum(-1).mean() / 2
    assert found["distance"]["domains"] == pytest.approx(float(apart), rel=1e-5)
    same = domains.evaluate(model, dict.fromkeys(WORDS, validation["films"]), batch_size=2)
    assert same["distance"]["domains"] == 0 < same["distance"]["halves"] < 1


def test_groups_add_up_their_experts():
    loads = {"films": [0.1, 0.2, 0.7], "editorials": [0.3, 0.3, 0.4]}
    rows = [{"layer": "h.0", "label": domain, "load": load} for domain, load in loads.items()]
    run = {when: {"experts": rows} for when in domains.WHEN}
    relu, swiglu = domains.group_loads([run, run], "relu*2,swiglu")
    assert (relu["layer"], relu["group"], swiglu["group"]) == (0, "relu", "swiglu")
    assert relu["films after"] == pytest.approx(0.3)
    assert relu["editorials before"] == pytest.approx(0.6)
    assert swiglu["editorials after"] == pytest.approx(0.4)


@pytest.mark.usefixtures("archive")
def test_the_whole_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(domains.QUICK, "sentences", 40)
    domains.main(quick=True, epochs=None, seeds="0,1", output=tmp_path / "out", json=True)
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "domains.json").read_text()) == result
    assert [(run["variant"], run["seed"]) for run in result["runs"]] == [
        (name, seed) for seed in (0, 1) for name in domains.GROUPS
    ]
    assert result["sentences"]["train"] == {"films": 36, "editorials": 36}
    for run in result["runs"]:
        assert run["after"]["loss"]["all"] < run["before"]["loss"]["all"]
        assert 0 <= run["after"]["distance"]["domains"] <= 1
    mixed, swiglu, gelu = result["variants"]
    assert mixed["difference"] is None
    for row in (swiglu, gelu):
        assert row["difference"] == pytest.approx(mixed["loss"]["all"] - row["loss"]["all"])
        assert 0 <= row["p_value"] <= 1
    console = Console(width=200)
    with console.capture() as shown:
        domains.show(result, console)
    assert f"{mixed['loss']['films']:.4f} ± {mixed['std']['films']:.4f}" in shown.get()
    assert f"{mixed['groups'][0]['films before']:.1%}" in shown.get()


@pytest.mark.usefixtures("archive")
def test_the_same_seed_is_the_same_run():
    data = {"train": {"films": [[1, 5, 6, 1]] * 40}, "validation": {key: [[1, 7, 1], [1, 5, 1]] for key in WORDS}}
    losses = [domains.run("gelu*8", seed, data, SIZES)["after"]["loss"]["all"] for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def test_bad_seeds_are_one_line(capsys):
    with pytest.raises(Exit) as caught:
        domains.main(quick=True, seeds="a")
    assert caught.value.exit_code == 2
    assert capsys.readouterr().err == "domains: --seeds must be numbers such as 0,1,2, got 'a'\n"
