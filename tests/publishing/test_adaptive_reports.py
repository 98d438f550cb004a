"""Adaptive activations in pictures: what is measured after training, the report's part on it, the family's figure."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comparing import assert_same
from datasets import Dataset
from pico import FAMILIES, make_native
from runs import IDS, MASK, report, write_run
from taskdata import make_rows, save_base
from torch.nn import functional

import hf_glu
from hf_glu import cli
from hf_glu.activation import registry
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.activation.learnable import mixes
from hf_glu.activation.modulated import ContextSource, Modulation
from hf_glu.activation.stock import elementwise_names
from hf_glu.errors import HfGluError, OptionError
from hf_glu.instruments.adaptive import adaptive_activations, adaptive_statistics, snapshot
from hf_glu.instruments.curves import GRID
from hf_glu.publishing.report.family import SUFFIXES, Panel, write_family
from hf_glu.publishing.report.family_curves import panels
from hf_glu.tasks import TASKS
from hf_glu.training import job as job_module
from hf_glu.training.data import measuring
from hf_glu.training.data.features import Features
from hf_glu.training.data.measuring import text_types
from hf_glu.training.job import run_job
from hf_glu.training.options import JobOptions, TrainingOptions

TYPES = ["loose", "strict", "loose", "strict"]
OPTIONS = TrainingOptions(
    max_steps=3, batch_size=8, lr=1e-3, activation_lr=0.1, max_length=32, precision="no", evaluate_every=0,
    eval_batch_size=8,
)  # fmt: skip


def moved(model, size=0.5):
    """Move what activations have of their own."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("mix", "choice", "threshold", "slope"):
                parameter.data += size * torch.randn(parameter.shape, generator=generator)
        if isinstance(module, ContextSource):
            module.weight.data *= 5
    return model


def converted(family, target, **more):
    model = FAMILIES[family].make()
    hf_glu.convert(model, target, check=False, **more)
    return model


def statistics(model, before, batches=None, types=None):
    rows = adaptive_statistics(model, batches or [{"input_ids": IDS, "attention_mask": MASK}], before, types)
    json.dumps(rows, allow_nan=False)
    assert not any(
        module._forward_pre_hooks for act in adaptive_activations(model).values() for module in act.modules()
    )
    return rows


def close(values, expected):
    torch.testing.assert_close(torch.as_tensor(values), expected.float(), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "target"), [("bert", "modulated_geglu"), ("gpt2", "modulated_stateful_geglu_new")])
def test_thresholds_are_those_of_the_context_vectors(family, target):
    model = converted(family, target)
    before = snapshot(model)
    moved(model)
    batches = [{"input_ids": IDS[:2], "attention_mask": MASK[:2]}, {"input_ids": IDS[2:], "attention_mask": MASK[2:]}]
    rows = statistics(model.train(), before, batches, TYPES)
    assert model.training
    vectors = hf_glu.context_vector(model.eval(), input_ids=IDS, attention_mask=MASK)[:, 0]
    shifts = [module for module in model.modules() if isinstance(module, Modulation)]
    assert len(rows) == len(shifts) == 2
    for row, shift in zip(rows, shifts, strict=True):
        assert [(each["type"], each["texts"]) for each in row["modulation"]] == [(None, 4), ("loose", 2), ("strict", 2)]
        all_channels = {}
        for each, kept in zip(row["modulation"], ([0, 1, 2, 3], [0, 2], [1, 3]), strict=True):
            found = {"threshold": vectors[kept] @ shift.threshold.T, "slope": 1 + vectors[kept] @ shift.slope.T}
            for key, texts in found.items():
                channels = texts.mean(0).detach()
                all_channels.setdefault(key, channels)
                close(each[key], channels.mean())
                close(each[f"{key}_spread"], channels.std(correction=0))
                if each["type"] is not None:
                    close(each[f"{key}_apart"], (channels - all_channels[key]).square().mean().sqrt())
        assert row["modulation"][1]["threshold"] != row["modulation"][2]["threshold"]
        threshold, slope = all_channels["threshold"], all_channels["slope"]
        approximate = "tanh" if family == "gpt2" else "none"
        curves = functional.gelu(slope * (GRID.unsqueeze(1) - threshold), approximate=approximate)
        close(row["curve"]["after"], curves.mean(1))
        close(row["curve"]["before"], functional.gelu(GRID, approximate=approximate))
        close(row["curve"]["low"], curves.quantile(0.1, dim=1))
        close(row["curve"]["high"], curves.quantile(0.9, dim=1))


def test_blocks_before_the_context_vector_are_not_modulated():
    model = converted("bert", "modulated_geglu", context={"layer": 1})
    first, second = statistics(moved(model), snapshot(model))
    assert first["modulation"] is None
    close(first["curve"]["after"], functional.gelu(GRID))
    assert [each["type"] for each in second["modulation"]] == [None]


@pytest.mark.parametrize("options", [None, {"per": "channel"}, {"gate": "linear", "rank": 2}])
def test_the_weights_of_a_mix_are_means_over_tokens_without_padding(options):
    model = converted("bert", "moa_swiglu", mix=options)
    before = snapshot(model)
    rows = statistics(moved(model), before)
    kept = {mix: [] for mix in mixes(model)}
    handles = [mix.register_forward_pre_hook(lambda mix, args: kept[mix].append(args[0][0])) for mix in kept]
    with torch.no_grad():
        for ids, mask in zip(IDS, MASK, strict=True):
            model(input_ids=ids[None, : int(mask.sum())])
    for handle in handles:
        handle.remove()
    for row, (mix, parts) in zip(rows, kept.items(), strict=True):
        tokens = torch.cat(parts)
        assert len(tokens) == int(MASK.sum())
        channel, own = mix.weights(tokens)
        every = own.unsqueeze(-1) if channel is None else own.unsqueeze(-1) + channel
        assert row["mix"]["functions"] == ["gelu", "silu", "relu", "tanh"]
        assert row["mix"]["before"] == [1, 0, 0, 0]
        mean = every.mean((0, 2)).detach()
        close(row["mix"]["after"], mean)
        torch.testing.assert_close(
            torch.tensor(row["mix"]["spread"]), every.detach().std((0, 2), correction=0), rtol=1e-3, atol=1e-4
        )
        assert min(row["mix"]["spread"]) > 1e-3
        phis = torch.stack([functional.gelu(GRID), functional.silu(GRID), functional.relu(GRID), GRID.tanh()])
        close(row["curve"]["after"], mean @ phis)
        close(row["curve"]["before"], functional.gelu(GRID))
        assert row["curve"]["low"] is None
    assert statistics(model, before, [{"input_ids": IDS}])[0]["mix"]["after"] != rows[0]["mix"]["after"]


def test_a_mix_that_all_tokens_share_has_no_spread_and_measuring_changes_nothing():
    model = converted("gpt2", "learnable_swiglu")
    before, state = snapshot(model), {name: each.clone() for name, each in moved(model).state_dict().items()}
    (row, _) = statistics(model, before)
    assert row["mix"]["spread"] is None
    close(row["mix"]["after"], mixes(model)[0].mix.detach())
    assert_same(dict(model.state_dict()), state, "bitwise")
    (row, _) = statistics(model, {})
    assert row["curve"]["before"] is row["mix"]["before"] is None


def test_each_stack_has_its_own_padding_and_context():
    model = converted("t5", "modulated_moa_reglu")
    before, labels = snapshot(model), IDS.flip(0).masked_fill(MASK.flip(0) == 0, -100)
    rows = statistics(moved(model), before, [{"input_ids": IDS, "attention_mask": MASK, "labels": labels}], TYPES)
    assert [(row["stack"], row["layer"]) for row in rows] == [(s, n) for s in ("encoder", "decoder") for n in (0, 1)]
    whole = statistics(model, before, [{"input_ids": IDS, "attention_mask": MASK, "labels": IDS.flip(0)}], TYPES)
    for row, other, same in zip(rows, whole, (True, True, False, False), strict=True):
        assert (row["mix"] == other["mix"]) == same
        assert len(row["modulation"]) == 3


def test_experts_and_activations_of_transformers_own():
    model = make_native("mixtral")
    hf_glu.convert(model, experts="moa_silu,silu")
    rows = statistics(model, snapshot(model), [{"input_ids": IDS}])
    assert [(row["layer"], row["activation"]) for row in rows] == [(0, "moa_silu"), (1, "moa_silu")]
    model = converted("gpt2", "swiglu", experts="learnable_swiglu*2,gelu_new*2")
    rows = statistics(model, snapshot(model))
    assert [row["site"] for row in rows] == [f"transformer.h.{layer}.mlp.banks.0.acts.0" for layer in (0, 1)]
    model = FAMILIES["bert"].make(hidden_act="prelu")
    before, weight = snapshot(model), model.bert.encoder.layer[0].intermediate.intermediate_act_fn.weight
    first = weight.detach().clone()
    weight.data.fill_(0.75)
    rows = statistics(model, before)
    close(rows[0]["curve"]["after"], functional.prelu(GRID, torch.tensor(0.75)))
    close(rows[0]["curve"]["before"], functional.prelu(GRID, first))
    assert rows[1]["curve"]["after"] == rows[1]["curve"]["before"]
    assert rows[0]["mix"] is rows[0]["modulation"] is None
    for other in (FAMILIES["bert"].make(), converted("bert", "stateful_geglu")):
        assert statistics(other, snapshot(other)) == []


def features(name, **columns):
    owners = [row for row in range(len(columns["label"])) for _ in (0, 1)]
    return Features(task=TASKS[name], raw=Dataset.from_dict(columns), data=None, owners=owners, text=False)


def test_the_types_of_texts():
    labelled = features("movie_reviews", label=[1, 0, 1])
    assert text_types(labelled, range(6)) == ["positive"] * 2 + ["negative"] * 2 + ["positive"] * 2
    assert text_types(features("movie_reviews", label=[1, 0, 1], source=["b", "a", "b"]), [0, 2, 5]) == [
        "b",
        "a",
        "b",
    ]
    assert text_types(features("movie_reviews", label=[1, 0], source=["a", "a"]), [0, 2]) == [
        "positive",
        "negative",
    ]
    many = features("movie_reviews", label=[1] * 9, source=[f"page {number}" for number in range(9)])
    assert text_types(many, [0]) == ["positive"]
    assert text_types(features("movie_ratings", label=[0.5, 1.5]), [0]) is None
    assert text_types(features("copa", label=[0, 1]), [0]) is None


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="module")
def sorted_texts(tmp_path_factory):
    """Return training and validation files, sorted by class, the latter longer than what is measured."""
    folder = tmp_path_factory.mktemp("texts")
    for name, count in (("train", 32), ("validation", 24)):
        rows = sorted(make_rows("movie_reviews", count), key=lambda row: row["label"])
        Dataset.from_list(rows).to_csv(folder / f"{name}.csv")
    return {"dataset": str(folder / "train.csv"), "validation": str(folder / "validation.csv")}


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_run_keeps_what_its_activations_were_and_are(peft, base, sorted_texts, tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "reloads_equal", lambda *given: True)
    monkeypatch.setattr(measuring, "BATCHES", 2)
    folder = tmp_path / "run"
    job = JobOptions(model=base, to="modulated_moa_geglu", peft=peft, output=str(folder), **sorted_texts)
    rows = run_job(job, OPTIONS)["adaptive"]
    assert rows == json.loads((folder / "results.json").read_text())["adaptive"]
    assert [row["site"] for row in rows] == [
        f"bert.encoder.layer.{layer}.intermediate.intermediate_act_fn" for layer in (0, 1)
    ]
    for row in rows:
        assert row["mix"]["before"] == [1, 0, 0, 0]
        assert max(map(abs, row["mix"]["after"][1:])) > 0.01
        assert row["curve"]["before"] != row["curve"]["after"]
        assert [(each["type"], each["texts"]) for each in row["modulation"]] == [(None, 16), ("0", 8), ("1", 8)]
        assert row["modulation"][0]["threshold_spread"] > 0.01
    page = report(folder)
    new = {"changes", "curves", "mix", "mix-spread", "slope", "slope-by-type", "threshold", "threshold-by-type"}
    assert {f"adaptive-{name}.png" for name in new} <= set(page.pictures)
    columns, *cells = page.tables["Thresholds and slopes by text type"]
    modulations = [(row["layer"], each) for row in rows for each in row["modulation"]]
    for cell, (layer, each) in zip(cells, modulations, strict=True):
        shown = dict(zip(columns, cell, strict=True))
        assert (shown["layer"], shown["texts"]) == (f"encoder {layer}", each["type"] or "all texts")
        assert shown["number"] == str(each["texts"])
        for column, key in (
            ("threshold", "threshold"),
            ("slope ±", "slope_spread"),
            ("slope, distance", "slope_apart"),
        ):
            assert shown[column] == ("\N{EN DASH}" if each[key] is None else f"{each[key]:.4g}")
    for row in rows:
        weight = page.row("Mix weights", f"encoder {row['layer']}")["gelu"]
        assert weight == f"1.000 → {row['mix']['after'][0]:.3f} ± {row['mix']['spread'][0]:.3f}"
        changes = [abs(a - b) for a, b in zip(row["curve"]["after"], row["curve"]["before"], strict=True)]
        assert page.row("Learned activations", f"encoder {row['layer']}")["largest change"] == f"{max(changes):.4f}"


@pytest.mark.parametrize(("to", "more"), [("geglu", {}), (None, {}), ("learnable_geglu", {"anneal": 0.5})])
def test_runs_without_such_activations_say_nothing(to, more, base, sorted_texts):
    results = run_job(JobOptions(model=base, to=to, **sorted_texts), replace(OPTIONS, **more))
    assert results["adaptive"] == []
    assert results["activations"]


def synthetic(layer, **more):
    grid = [-1.0, 0.0, 1.0]
    row = {"site": f"encoder.layer.{layer}.act", "layer": layer, "stack": "encoder", "activation": "modulated_geglu"}
    curve = {"g": grid, "before": [0, 0, 1], "after": [0, 0.25, 1.5], "low": [0, 0, 1], "high": [0.5, 0.5, 2]}
    return {**row, "curve": curve, "mix": None, "modulation": None, **more}


@pytest.mark.slow
def test_a_page_without_them_has_no_such_part(tmp_path):
    write_run(tmp_path / "run", adaptive=[])
    write_run(tmp_path / "old")
    for name in ("run", "old"):
        assert "Activations that were trained" not in report(tmp_path / name).text


@pytest.mark.slow
def test_the_curves_take_their_colours_from_the_page(tmp_path):
    write_run(tmp_path / "run", adaptive=[synthetic(0), synthetic(1), synthetic(2), synthetic(3)])
    page = report(tmp_path / "run")
    assert {"adaptive-curves.png", "adaptive-changes.png"} <= set(page.pictures)
    assert not [name for name in page.pictures if "mix" in name or "threshold" in name]
    assert {"encoder 0", "encoder 3", "Learned activations"} <= set(re.findall(r">([^<>]+)</text>", page.html))
    assert not re.search(r"style=\"[^\"]*#[0-9a-f]{6}", page.html)
    row = page.row("Learned activations", "encoder 2")
    assert (row["largest change"], row["at g"], row["module"]) == ("0.5000", "+1.0", "encoder.layer.2.act")
    assert any("Curves of 4 layers: What training changed, from 0 to 0.5" in alt for alt in page.alts)


@pytest.mark.slow
def test_what_differs_in_more_than_its_layer_has_a_part_of_its_own(tmp_path):
    names = [("encoder.layer.0.act", "geglu"), ("encoder.layer.0.mlp.acts.0", "moa_geglu"),
             ("encoder.layer.0.mlp.acts.1", "moa_geglu"), ("encoder.layer.1.mlp.acts.1", "moa_geglu")]  # fmt: skip
    rows = [synthetic(int(site.split(".")[2]), site=site, activation=name) for site, name in names]
    write_run(tmp_path / "run", adaptive=rows)
    page = report(tmp_path / "run")
    for title in ("Encoder, geglu", "Encoder, moa_geglu, mlp.acts.0", "Encoder, moa_geglu, mlp.acts.1"):
        assert title in page.text
    assert {"adaptive-curves.png", "adaptive-1-curves.png", "adaptive-2-curves.png"} <= set(page.pictures)


ODD = {
    "curve": "no curve",
    "mix": {"functions": ["<b>", 3], "before": "x", "after": [0.5, 0.25], "spread": [float("nan"), 1]},
    "modulation": [{"type": "<script>", "texts": "many", "threshold": 0.125, "slope": None}, 5],
    "layer": None,
}


@pytest.mark.slow
def test_oddities_are_left_out(tmp_path):
    whole = synthetic(0)["curve"]
    rows = [
        {**synthetic(0), **ODD}, synthetic(1, site=7, stack=[1]), synthetic(2, curve={**whole, "after": [1, 2]}),
        synthetic(3, curve={**whole, "before": None, "low": [1]}, mix={"functions": ["relu"], "after": [1, 2]}),
        "no row", {},
    ]  # fmt: skip
    write_run(tmp_path / "run", adaptive=rows)
    page = report(tmp_path / "run")
    assert "<script" not in page.html
    assert any("<script>" in row for table in page.tables.values() for row in table)


def test_the_family_has_every_name_and_its_values():
    derived, families = panels()
    by_name = {panel.name: panel for panel in (*derived, *families)}
    assert {entry.name for entry in registry} <= set(by_name)
    assert all(panel.equation == registry[panel.name].equation for panel in by_name.values())
    wide = torch.linspace(-12, 12, 97)
    drawn = [build_elementwise(gate)(wide) for panel in derived if (gate := registry[panel.name].gate)]
    for name in elementwise_names():
        value = build_elementwise(name)(wide)
        assert sum(torch.allclose(value, other, atol=1e-5) for other in drawn) == 1, name
    g = torch.tensor(by_name["swiglu"].g)
    assert (float(g[0]), float(g[-1])) == (-4, 4)

    def same(name, label, expected):
        close(by_name[name].lines[label], expected.detach())

    same("swiglu", "", functional.silu(g))
    same("relu2glu", "", g.relu().square())
    same("tanh_glu", "", g.tanh())
    same("swiglu_oss", "", 2 * g * (1.702 * g).sigmoid())
    same("modulated_swiglu", "threshold 1", functional.silu(g - 1))
    same("modulated_swiglu", "slope 2", functional.silu(2 * g))
    same("stateful_swiglu", "alpha 2, s = 1", functional.silu(g + 2))
    same("stateful_swiglu", "beta 2, s = 1", functional.silu(g + 2 * (g.sigmoid() - 1)))
    same("kappa_swiglu", "a r = 1", functional.silu(2 * g))
    same("kappa_swiglu", "a r = -0.5", functional.silu(0.5 * g))
    same("learnable_swiglu", "half tanh", (functional.silu(g) + g.tanh()) / 2)
    chosen = torch.stack([0 * g, 0 * g, 0 * g, 2 * g]).softmax(0) - 0.25
    values = torch.stack([functional.silu(g), functional.gelu(g), g.relu(), g.tanh()])
    same("moa_swiglu", "tanh where g > 0", functional.silu(g) + (chosen * values).sum(0))
    for panel in families:
        close(panel.lines["swiglu"], functional.silu(g))
        assert len(panel.lines) >= 3


def few():
    panel = Panel(name="swiglu", equation="silu(g) * u", g=[-1.0, 0.0, 1.0], lines={"": [0.0, 0.0, 1.0]})
    return [[panel] * 6, [replace(panel, lines={"a": [0, 1, 2], "b": [2, 1, 0]})]]


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".SVG", b"<?xml"), (".pdf", b"%PDF")])
def test_the_figure_is_written_by_its_suffix(suffix, start, tmp_path):
    path = tmp_path / f"out{suffix}"
    assert write_family(few, path) == path
    content = path.read_bytes()
    assert content.startswith(start)
    write_family(few, path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_the_command_draws_the_family(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_glu.publishing.report.family_curves.panels", few)
    out = tmp_path / "out.png"
    assert cli.run(["activations", "--plot", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert cli.run(["activations", "--plot", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"plot": str(out)}
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("out.gif", "suffix .png, .svg, .pdf, got"), ("out", "suffix"), ("nowhere/out.png", "there is no folder"),
        ("folder.png", "can't be written: Is a directory"), ("file/out.svg", "there is no folder"),
    ],
)  # fmt: skip
def test_a_plot_that_can_not_be_written_is_one_clear_line(name, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_glu.publishing.report.family_curves.panels", few)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    assert cli.run(["activations", "--plot", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert str(tmp_path / name) in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_the_old_plot(tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OptionError, match="can't be written: No space left"):
        write_family(few, path)
    assert [each.name for each in tmp_path.iterdir()] == ["out.png"]
    assert path.read_bytes() == b"old"


def test_missing_matplotlib_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for suffix in SUFFIXES:
        with pytest.raises(HfGluError, match=re.escape('pip install "hf_glu[report]"')):
            write_family(few, tmp_path / f"out{suffix}")
    assert not list(tmp_path.iterdir())
