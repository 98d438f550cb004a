"""The recipes of stateful gates: what their comparisons rest on, and both from end to end on made-up data."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import domains
import memory
import pytest
import small_training
import stateful_lm
import torch
from comparing import assert_same
from rich.console import Console
from typer import Exit

from hf_glu.activation.stateful import Memory
from hf_glu.activation.wrapped import shifts
from hf_glu.tasks import movies

SIZES = SimpleNamespace(**memory.SIZES | memory.QUICK)
LM_SIZES = SimpleNamespace(**stateful_lm.SIZES | stateful_lm.QUICK)
WORDS = ("a", "film", "the", "plot", "vote", "was", "dull")
MODELS = [(family, name) for family, entry in stateful_lm.FAMILIES.items() for name in entry["activations"]]


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Put files in the cache as pip would; nothing may be fetched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(movies, "SHA256", {})  # of the real files
    monkeypatch.setattr(movies.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    draw = random.Random(0)
    for name in domains.DOMAINS.values():
        texts = [
            " ".join(draw.choices("a film the plot vote was dull".split(), k=draw.randint(3, 12))) for _ in "x" * 60
        ]
        path = movies._cache_folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(f"{number}\t0.5\t{text}" for number, text in enumerate(texts)), encoding="utf-8")


@pytest.mark.parametrize("activation", [memory.PLAIN, memory.STATEFUL])
def test_alpha_beta_and_decay_learn_at_their_own_rate(activation, monkeypatch):
    model, made = memory.make_model(activation, SIZES, 0), []
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups: made.extend(groups) or torch.optim.SGD(groups, lr=1.0))
    small_training.train(model, lambda _: memory.make_batch(4, 9, 0), 1, lr=0.01, factor=10.0, title="")
    own = {id(p) for module in model.modules() if isinstance(module, Memory) for p in module.parameters()}
    assert len(own) == (3 * SIZES.layers if activation == memory.STATEFUL else 0)
    apart = [group for group in made if group["initial_lr"] == pytest.approx(0.1)]
    assert {id(parameter) for group in apart for parameter in group["params"]} == own
    assert all(group["weight_decay"] == 0 for group in apart)
    assert {group["initial_lr"] for group in made if group not in apart} == {0.01}


def test_a_query_asks_for_the_flag_that_came_a_distance_before():
    batch = memory.make_batch(200, 9, seed=3)
    flags, places, asked = set(), set(), 0
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        (place,) = (at for at, token in enumerate(ids) if token < memory.FLAGS)
        (answer,) = (at for at, label in enumerate(labels) if label != memory.IGNORED)
        assert ids.index(memory.QUERY) == place + 9 == answer - 1
        assert labels[answer] == ids[place]
        flags.add(ids[place])
        places.add(place)
        asked += 1
    assert (flags, places, asked) == (set(range(memory.FLAGS)), set(range(memory.LEAD)), 200)
    assert_same(memory.make_batch(200, 9, seed=3), batch, "bitwise")
    assert not torch.equal(memory.make_batch(200, 9, seed=4)["input_ids"], batch["input_ids"])


@pytest.mark.parametrize("activation", memory.ACTIVATIONS)
def test_only_a_state_reaches_further_than_the_windows(activation):
    torch.manual_seed(0)
    model = memory.make_model(activation, SIZES, 0).eval()
    with torch.no_grad():  # canon_ and smear_ begin without effect
        for shift in shifts(model):
            if not isinstance(shift, Memory):
                for parameter in shift.parameters():
                    parameter.normal_()

    def changes(distance: int) -> bool:
        ids = torch.randint(memory.NOISE, memory.VOCABULARY, (1, 40))
        ids[0, -1] = memory.QUERY
        found = []
        for flag in range(2):
            ids[0, -1 - distance] = flag
            with torch.no_grad():
                found.append(model(input_ids=ids).logits[0, -1])
        return not torch.equal(*found)

    reach = memory.reach(SIZES)
    assert changes(reach)
    more = {memory.CANON: 3, memory.SMEAR: 1}.get(activation, 0) * SIZES.layers  # tokens that the gates read
    assert changes(reach + more)
    for distance in (reach + more + 1, 16, 32):
        assert changes(distance) == (activation == memory.STATEFUL)


@pytest.mark.parametrize("sizes", [memory.SIZES, memory.SIZES | memory.QUICK], ids=["full", "quick"])
def test_the_plain_model_has_no_fewer_parameters(sizes):
    plain, stateful = (
        memory.make_model(name, SimpleNamespace(**sizes), 0).num_parameters()
        for name in (memory.PLAIN, memory.STATEFUL)
    )
    assert stateful <= plain <= 1.001 * stateful


@pytest.mark.slow
def test_the_state_learns_what_windows_cant():
    sizes = SimpleNamespace(**memory.SIZES | memory.QUICK | {"batch_size": 32, "steps": 120, "test": 200})
    found = {name: memory.run(name, 8, 0, sizes)["accuracy"] for name in (memory.PLAIN, memory.STATEFUL)}
    assert found[memory.PLAIN] < 0.4
    assert found[memory.STATEFUL] > 0.7


@pytest.mark.slow
def test_the_whole_memory_recipe(tmp_path, capsys):
    memory.main(quick=True, distances="8,12", seeds="0,1", output=tmp_path / "out", json=True)
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "memory.json").read_text()) == result
    assert [(run["distance"], run["seed"], run["activation"]) for run in result["runs"]] == [
        (distance, seed, name) for distance in (8, 12) for seed in (0, 1) for name in memory.ACTIVATIONS
    ]
    assert (result["chance"], result["reach"]) == (0.25, 6)
    row = result["rows"][1]
    assert row["activation"] == memory.STATEFUL
    assert row["accuracies"] == [
        run["accuracy"] for run in result["runs"][1 : 2 * len(memory.ACTIVATIONS) : len(memory.ACTIVATIONS)]
    ]
    assert row["mean"] == pytest.approx(sum(row["accuracies"]) / 2)
    console = Console(width=200)
    with console.capture() as shown:
        memory.show(result, console)
    assert f"{row['mean']:.1%}" in shown.get()
    assert "25.0%" in shown.get()


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        (memory, {"distances": "6,16", "seeds": "0"}, "distances must be above 6, what attention reaches, got 6"),
        (memory, {"distances": "8", "seeds": "a"}, "--seeds must be numbers such as 0,1,2, got 'a'"),
        (stateful_lm, {"seeds": "0,"}, "--seeds must be numbers such as 0,1,2, got '0,'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(recipe, more, message, capsys):
    with pytest.raises(Exit) as caught:
        recipe.main(quick=True, **more)
    assert caught.value.exit_code == 2
    assert capsys.readouterr().err == f"{recipe.__name__}: {message}\n"


@pytest.mark.parametrize("family", stateful_lm.FAMILIES)
def test_both_models_of_a_family_begin_the_same(family):
    rows = [[1, *range(5, 5 + length), 1] for length in (3, 9, 4, 14)]
    plain, stateful = (stateful_lm.make_model(family, name, LM_SIZES, 0) for f, name in MODELS if f == family)
    weights = dict(stateful.named_parameters())
    assert_same({key: weights[key] for key, _ in plain.named_parameters()}, dict(plain.named_parameters()), "bitwise")
    new = sum(module.alpha.numel() for module in stateful.modules() if isinstance(module, Memory))
    assert stateful.num_parameters() == plain.num_parameters() + 3 * new > plain.num_parameters()
    losses = [stateful_lm.evaluate(model, rows, 2) for model in (plain, stateful)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    total = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            total += float(plain.eval()(input_ids=ids, labels=ids).loss) * (len(row) - 1)
    assert losses[0] == pytest.approx(total / sum(len(row) - 1 for row in rows), rel=1e-5)


@pytest.mark.usefixtures("archive")
def test_the_whole_language_model_recipe(tmp_path, capsys):
    stateful_lm.main(quick=True, epochs=0.3, seeds="0,1", output=tmp_path / "out", json=True)
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "stateful_lm.json").read_text()) == result
    assert [(run["family"], run["activation"], run["seed"]) for run in result["runs"]] == [
        (*each, seed) for seed in (0, 1) for each in MODELS
    ]
    assert result["sentences"] == {"train": 108, "validation": 12}
    for plain, stateful in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        assert plain["difference"] is plain["p_value"] is None
        assert stateful["difference"] == pytest.approx(stateful["mean"] - plain["mean"])
        assert stateful["losses"] != plain["losses"], "the state does nothing"
        assert 0 <= stateful["p_value"] <= 1
    console = Console(width=200)
    with console.capture() as shown:
        stateful_lm.show(result, console)
    assert f"{result['rows'][0]['mean']:.4f} ± {result['rows'][0]['std']:.4f}" in shown.get()
