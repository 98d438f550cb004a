"""Reports of synthetic runs, suites and comparisons, read back from their HTML; statistics against plain formulas."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from comparing import fresh_process
from pico import FAMILIES, make_native
from runs import EVIL, IDS, MASK, contrast, report, write_run

import hf_glu
from hf_glu.errors import CheckpointError, DataError, HfGluError
from hf_glu.instruments.activity import activation_statistics
from hf_glu.publishing.report import write_report
from hf_glu.publishing.report.collect import collect
from hf_glu.publishing.report.curves import averaged, smoothed
from hf_glu.publishing.report.drawing import PAPER, SERIES
from hf_glu.publishing.report.formats import change, duration, metric, p_value, short
from hf_glu.publishing.report.page import TEMPLATE


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    write_run(folder, stacks=("encoder", "decoder"))
    return report(folder)


def test_a_runs_numbers_are_in_its_page(run_page):
    row = run_page.row("Metrics on the validation data", "f1")
    assert row == {"metric": "f1", "before training": "50.00%", "after training": "91.00%", "part of": "score"}
    assert run_page.row("Metrics on the validation data", "loss")["after training"] == "0.4321"
    assert run_page.row("Evaluations while training", "20")["score"] == "71.25%"
    row = run_page.row("Activations by layer", "decoder 1")
    assert (row["open"], row["sparsity"], row["dead"], row["gate std"]) == ("26.00%", "1.23%", "0.00%", "0.750")
    row = run_page.row("Conversion by site", "encoder.layer.0")
    assert row["activation"], row["parameters"] == ("gelu → geglu", "1.3 k → 2.0 k")
    assert (row["route"], row["promise"], row["relative error"]) == ("up = 1", "exact", "2.5e-07")
    row = run_page.row("Parameters", "parameters")
    assert (row["before"], row["after"], row["change"]) == ("4,000", "5,000", "+25.0%")
    assert run_page.row("Training and speed", "training time")["value"] == "2 min 05 s"
    assert run_page.row("Training and speed", "tokens per second")["value"] in ("1,234", "1,235")
    assert run_page.row("Options", "seed")["value"] == "3"
    assert "pico on mrpc" in run_page.text
    assert "40.00% before training" in run_page.text


def test_a_runs_figures(run_page):
    assert run_page.pictures == ["dead.png", "gates.png", "loss.png", "open.png", "score.png", "sparsity.png"]
    assert any("best 90.00%" in alt for alt in run_page.alts)
    assert any("decoder 26.00%" in alt for alt in run_page.alts)
    drawn = set(re.findall(r">([^<>]+)</text>", run_page.html))
    assert {"encoder", "decoder", "Training loss", "training step", "share (%)"} <= drawn
    assert "http" not in run_page.html
    assert not re.search(r"style=\"[^\"]*#[0-9a-f]{6}", run_page.html), "a colour that no scheme changes"


def test_an_unfinished_run_reports_what_exists_and_a_line_being_written_is_left_out(tmp_path):
    write_run(tmp_path / "run", finished=False)
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 41, "lo')
    page = report(tmp_path / "run")
    assert "unfinished" in page.text
    assert "score so far" in page.text
    assert "90.00%" in page.text
    assert "Metrics on the validation data" not in page.tables
    assert page.pictures == ["loss.png", "score.png"]


@pytest.fixture(scope="module")
def suite_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "suite"
    tasks = {"mrpc": write_run(folder / "mrpc", activations=[]), "cola": {"score": 0.5125, "metrics": {"mcc": 0.5125}}}
    write_run(folder / "rte", task="rte", finished=False)
    index = {"suite": "glue", "model": "pico", "activation": "geglu", "tasks": tasks, "score": 0.70625}
    (folder / "suite.json").write_text(json.dumps({**index, "partial": True, "missing": ["rte", "../qnli"]}))
    return report(folder)


def test_a_suite_shows_each_task_and_is_marked_partial(suite_page):
    assert suite_page.row("Tasks", "mrpc")["state"] == "finished"
    assert suite_page.row("Tasks", "mrpc")["score"] == "90.00%"
    assert suite_page.row("Tasks", "mrpc")["metrics"] == "accuracy 89.00%, f1 91.00%, loss 0.4321"
    assert suite_page.row("Tasks", "cola")["score"] == "51.25%"
    assert suite_page.row("Tasks", "rte")["state"] == "unfinished"
    assert suite_page.row("Tasks", "../qnli")["state"] == "missing"
    assert "partial" in suite_page.text
    assert "70.62%" in suite_page.text
    assert "mean of 2 of 4 tasks" in suite_page.text
    assert {"scores.png", "progress.png", "mrpc-loss.png", "rte-score.png"} <= set(suite_page.pictures)


def test_a_suite_without_its_index_yet_is_reported(tmp_path):
    write_run(tmp_path / "suite" / "mrpc", finished=False)
    collected = collect(tmp_path / "suite")
    assert (collected.kind, list(collected.runs), collected.runs["mrpc"].state) == ("suite", ["mrpc"], "unfinished")


def test_a_comparison_has_means_deviations_differences_and_p_values(tmp_path):
    for name in ("dense", EVIL.replace("/", "|")):
        for seed in (0, 1):
            write_run(tmp_path / "c" / f"{name}-seed{seed}", model=EVIL, activations=[], conversion=None)
    variants = [
        {"name": "dense", "scores": [0.9, 0.91], "mean": 0.905, "std": 0.0071, "difference": None, "p_value": None},
        {"name": EVIL.replace("/", "|"), "scores": [0.93, 0.94], "mean": 0.935, "std": 0.0071, "difference": 0.03,
         "p_value": 0.0123, "parameters": 5000, "seconds": 12.34},
    ]  # fmt: skip
    index = {"task": "mrpc", "model": EVIL, "metric": "accuracy", "seeds": [0, 1], "baseline": "dense"}
    (tmp_path / "c" / "compare.json").write_text(json.dumps({**index, "variants": variants}))
    page = report(tmp_path / "c")
    row = page.row("Variants by accuracy", EVIL.replace("/", "|"))
    assert row == {
        "variant": EVIL.replace("/", "|"), "mean": "93.50%", "standard deviation (points)": "0.71",
        "difference (points)": "+3.00", "p-value": "0.012", "parameters": "5,000", "time": "12.3 s",
        "single seeds": "93.00%, 94.00%",
    }  # fmt: skip
    assert page.row("Variants by accuracy", "dense")["p-value"] == "\N{EN DASH}"
    assert f"{EVIL} on mrpc" in page.text
    assert "<script" not in page.html
    assert "comparison.png" in page.pictures


def test_oddities_are_left_out_and_nothing_is_executed(tmp_path):
    folder = tmp_path / "run"
    odd = {"activations": "many", "conversion": [1], "main": "f1", "training": 7, "score": None, "before": []}
    odd["metrics"] = {'"><img src=x onerror=x>': 0.5, "f1": "high", "nan": float("nan")}
    (folder / "results.json").write_text(json.dumps({**write_run(folder), **odd}))
    (folder / "run.json").write_text(json.dumps({"model": None, "options": {EVIL: [EVIL]}, "parameters": "none"}))
    (folder / "log.jsonl").write_text('\n{"step": 1, "loss": NaN}\n{"loss": 1.5}\n{"evaluation": 3, "score": "x"}\n')
    page = report(folder)
    assert page.row("Metrics on the validation data", '"><img src=x onerror=x>')["after training"] == "50.00%"
    assert EVIL in [row[0] for row in page.tables["Options"]]
    assert not page.pictures


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", '{"task": "mrpc",\n "score": }', r"results\.json, line 2: broken JSON"),
        ("results.json", "[1]", r"results\.json, line 1: an object .* not list"),
        ("suite.json", "", r"suite\.json, line 1: broken JSON"),
        ("log.jsonl", '{"step": 1}\n{"step": 2,}\n{"step": 3}\n', r"log\.jsonl, line 2: broken JSON"),
        ("log.jsonl", '{"step": 1}\n{"step": 2,\n', r"log\.jsonl, line 2: broken JSON"),
        ("log.jsonl", "{}\n3\n", r"log\.jsonl, line 2: an object .* not int"),
        ("run.json", b"\xff\xfe{}", r"run\.json is no text in UTF-8"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_folders_without_a_run_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is no folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"nothing to report in .*: it has none of run\.json"):
        write_report(tmp_path)


def test_a_report_that_can_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text('{"model": "pico"}')
    path = write_report(tmp_path)
    old = path.read_text()

    def full(partial, target):
        assert partial.name.startswith(".")
        raise OSError(28, "No space left on device")

    (tmp_path / "run.json").write_text('{"model": "other"}')
    monkeypatch.setattr("hf_glu.checkpoint.writing.os.replace", full)
    with pytest.raises(CheckpointError, match="can't be written: No space left"):
        write_report(tmp_path)
    assert path.read_text() == old
    assert not list(tmp_path.glob(".*"))


def test_missing_matplotlib_is_one_clear_error(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(HfGluError, match=re.escape('pip install "hf_glu[report]"')):
        write_report(tmp_path / "run")
    assert not (tmp_path / "run" / "report.html").exists()


def test_the_room_is_imported_without_matplotlib_jinja_and_torch():
    code = "import sys, hf_glu.publishing.report; print(sorted({'matplotlib', 'jinja2', 'torch'} & set(sys.modules)))"
    done = fresh_process(code)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (metric("f1", 0.91234), "91.23%"), (metric("mcc", -0.05), "-5.00%"), (metric("exact_match", 81.5), "81.50"),
        (metric("f1", 0.9, among=[88.1]), "0.90"), (metric("eval_loss", 0.5), "0.50"), (metric("f1", None), None),
        (metric("f1", True), None), (duration(59.94), "59.9 s"), (duration(60), "1 min 00 s"),
        (duration(7384), "2 h 03 min"), (p_value(0.0004), "<0.001"), (p_value(0.05), "0.050"), (short(999), "999"),
        (short(66955010), "67.0 M"), (change(0, 5), None), (change(4, 5), "+25.0%"),
    ],
)  # fmt: skip
def test_numbers_read_well(shown, expected):
    assert shown == expected


def test_smoothing_keeps_a_constant_and_a_mean_needs_shared_steps():
    assert smoothed([(x, 3.0) for x in range(100)]) == [(x, pytest.approx(3.0)) for x in range(100)]
    assert smoothed([(0, 1.0), (1, 2.0)]) == [(0, 1.0), (1, 2.0)]  # too short to smooth
    jumps = [(x, float(x % 2)) for x in range(200)]
    assert all(0.35 < y < 0.65 for _, y in smoothed(jumps)[20:])
    assert averaged([[(0, 1.0), (1, 2.0)], [(1, 4.0)]]) == [(1, 3.0)]
    assert averaged([[(0, 1.0)], [(1, 4.0), (2, 5.0)]]) == [(1, 4.0), (2, 5.0)]


def test_labels_can_be_read_in_both_schemes():
    dark = TEMPLATE.read_text(encoding="utf-8").partition("prefers-color-scheme: dark")[2]
    colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", dark))
    assert len([name for name in colours if name.startswith("series")]) == len(SERIES)
    assert all(contrast(colour, PAPER) >= 4.5 for colour in SERIES)
    for name in ("ink", "muted", *(f"series-{index}" for index in range(len(SERIES)))):
        assert contrast(colours[name], colours["paper"]) >= 4.5, name


def direct(model, batches, masks):
    """Return the statistics from all values at once: g is what the activation is given, a the out-projection."""
    sites, kept = hf_glu.find_sites(model), {}

    def record(name, width):
        def hook(module, args):
            x, mask = args[0].detach(), masks[len(kept.setdefault(name, []))]
            kept[name].append(x.reshape(-1, x.shape[-1])[mask.flatten()][:, :width])

        return hook

    handles = [site.act.register_forward_pre_hook(record((site.name, "g"), site.width)) for site in sites]
    handles += [site.out_proj.register_forward_pre_hook(record((site.name, "a"), site.width)) for site in sites]
    with torch.no_grad():
        for batch in batches:
            model.eval()(**batch)
    for handle in handles:
        handle.remove()
    rows = []
    for site in sites:
        g, a = (torch.cat(kept[site.name, which]).double() for which in ("g", "a"))
        small = a.abs() <= 1e-3 * a.square().mean().sqrt()
        rows.append(
            {"open": (g > 0).double().mean(), "sparsity": small.double().mean(), "dead": small.all(0).double().mean(),
             "gate_mean": g.mean(), "gate_std": g.std(unbiased=False)}
        )  # fmt: skip
    return [{key: float(value) for key, value in row.items()} for row in rows]


def converted(family, target):
    model = FAMILIES[family].make()
    hf_glu.convert(model, target)
    return model


MODELS = {
    "dense": lambda: FAMILIES["bert"].make(),
    "dense Conv1D": lambda: FAMILIES["gpt2"].make(),
    "dense relu, dead units": lambda: FAMILIES["opt"].make(),
    "widened": lambda: converted("bert", "swiglu"),
    "gated": lambda: make_native("llama"),
    "packed": lambda: make_native("phi3"),
}


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_all_values_without_padding(name):
    model = MODELS[name]()
    batches = [{"input_ids": IDS, "attention_mask": MASK}, {"input_ids": IDS.flip(0), "attention_mask": MASK}]
    model.train()
    found = activation_statistics(model, iter(batches))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    expected = direct(model, batches, [MASK.bool()] * 2)
    assert [row["layer"] for row in found] == [0, 1]
    for row, right in zip(found, expected, strict=True):
        assert {key: row[key] for key in right} == pytest.approx(right, rel=1e-5, abs=1e-9)
    json.dumps(found, allow_nan=False)


def test_statistics_name_the_site_and_see_dead_units():
    model = FAMILIES["opt"].make()
    row = activation_statistics(model, [{"input_ids": IDS}])[1]
    assert (row["activation"], row["width"], row["stack"]) == ("relu", 40, "decoder")
    assert 0.3 < row["sparsity"] < 0.8
    assert 0 < row["dead"] < row["sparsity"]
    hf_glu.convert(model, "reglu")
    assert activation_statistics(model, [{"input_ids": IDS}])[1]["activation"] == "reglu"


def test_statistics_mask_each_stack_by_its_own_padding():
    model = FAMILIES["t5"].make()
    target = {"decoder_input_ids": IDS[:, :5], "decoder_attention_mask": MASK[:, :5]}
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    found = {row["site"]: row for row in activation_statistics(model, [{**inputs, **target}])}
    sites = [site.name for site in hf_glu.find_sites(model)]
    for stack, mask in (("encoder", MASK), ("decoder", MASK[:, :5])):
        part = [name for name in sites if name.startswith(stack)]
        assert len(part) == 2
        all_values = direct_of_stack(model, {**inputs, **target}, mask, part)
        for name in part:
            assert found[name]["gate_mean"] == pytest.approx(all_values[name], rel=1e-5)
    ids = IDS[:, :5].contiguous()
    labels = ids.masked_fill(MASK[:, :5] == 0, -100)
    by_labels = activation_statistics(model, [{**inputs, "labels": labels}])
    whole = activation_statistics(model, [{**inputs, "labels": ids}])
    assert [row["gate_mean"] for row in by_labels[:2]] == [row["gate_mean"] for row in whole[:2]]
    assert by_labels[2]["gate_mean"] != whole[2]["gate_mean"]


def direct_of_stack(model, batch, mask, names):
    means, handles = {}, []
    for site in hf_glu.find_sites(model):
        if site.name in names:
            handles.append(site.act.register_forward_pre_hook(
                lambda module, args, name=site.name: means.update({name: float(args[0][mask.bool()].double().mean())})
            ))  # fmt: skip
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return means


def test_statistics_skip_expert_banks_and_need_batches():
    assert activation_statistics(make_native("mixtral"), [{"input_ids": IDS}]) == []
    with pytest.raises(DataError, match="no batches"):
        activation_statistics(FAMILIES["bert"].make(), [])
