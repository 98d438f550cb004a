"""Experts in what is reported: active parameters, loads on validation data, the table, the card, the HTML page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import combinations
from statistics import fmean

import pytest
import torch
import transformers
from comparing import assert_same
from pico import FAMILIES, LAYERS, make_native
from rich.console import Console
from runs import IDS, MASK, contrast, report, write_run
from taskdata import save_base, write_dataset

import hf_glu
from hf_glu.cli import comparing, tables
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.sites import find_banks
from hf_glu.instruments.activity import expert_loads
from hf_glu.instruments.routing import active_parameters
from hf_glu.publishing.card.card import write_card
from hf_glu.publishing.report.drawing import INK, PAPER
from hf_glu.publishing.report.experts import LESS, MORE, STRONGEST, by_experts
from hf_glu.publishing.report.page import TEMPLATE
from hf_glu.training import job as job_module
from hf_glu.training.baseline import finetune_and_report
from hf_glu.training.comparing.classifiers import compare
from hf_glu.training.options import JobOptions, TrainingOptions

GROUPS = "relu*2,gelu:24*1,learnable_swiglu*3"
OPTIONS = TrainingOptions(
    max_steps=2, batch_size=4, lr=1e-3, max_length=32, precision="no", evaluate_every=0, eval_batch_size=8
)


def scratch(family, groups=GROUPS, **more):
    """Return a model of experts whose routers tell tokens apart."""
    made = FAMILIES[family]
    experts = {"groups": groups, "top_k": 2, **more}
    model = made.make(**{made.field: made.exact}, hf_glu={"experts": experts})
    for ffn in find_experts(model).values():
        torch.nn.init.normal_(ffn.router.weight)
    return model


@pytest.mark.parametrize(("family", "more"), [("gpt2", {}), ("t5", {"top_k": 1}), ("bert", {"shared": "gelu:8*2"})])
def test_active_parameters_are_the_mean_over_all_choices_of_experts(family, more):
    model = scratch(family, **more)
    expected = sum(parameter.numel() for parameter in model.parameters())
    for ffn in find_experts(model).values():
        sizes = []
        for bank in ffn.banks:
            weights = (bank.in_proj, bank.out_proj, bank.in_bias, bank.out_bias)
            one = sum(weight[0].numel() for weight in weights if weight is not None)
            sizes += [one] * bank.count
        assert len(set(sizes)) > 1
        used = fmean(sum(chosen) for chosen in combinations(sizes, ffn.options.top_k))
        expected += used - sum(sizes)
    assert active_parameters(model) == pytest.approx(expected, abs=0.51)


def test_active_parameters_where_a_part_of_the_config_says_how_many_are_chosen():
    small = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32,
        "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "head_dim": 8,
    }  # fmt: skip
    shown = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "deepstack_visual_indexes": [],
    }  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(text_config=small, vision_config=shown)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    idle = sum(site.anchor.gate_up_proj.numel() + site.anchor.down_proj.numel() for site in find_banks(model))
    assert idle
    assert active_parameters(model) == model.num_parameters() - idle * 3 // 4


def test_active_parameters_of_native_banks_and_of_dense_models():
    model = make_native("mixtral", num_local_experts=4, num_experts_per_tok=2)
    small = make_native("mixtral", num_local_experts=2, num_experts_per_tok=2)
    rows = 2 * LAYERS * model.config.hidden_size  # the routers' own for the experts that the smaller one lacks
    assert active_parameters(model) == active_parameters(small) + rows
    assert active_parameters(small) == small.num_parameters() < model.num_parameters()
    dense = FAMILIES["bert"].make()
    assert active_parameters(dense) == dense.num_parameters()


def recount(model, names, sequences):
    """Return each layer's load from sequences without padding, one at a time."""
    found = {}
    handles = [
        find_experts(model)[name].router.register_forward_hook(
            lambda router, args, routing, name=name: found.setdefault(name, []).append(routing.experts.flatten())
        )
        for name in names
    ]
    with torch.no_grad():
        for inputs in sequences:
            model(**inputs)
    for handle in handles:
        handle.remove()
    counts = {name: torch.bincount(torch.cat(parts), minlength=6) for name, parts in found.items()}
    return {name: (count / count.sum()).double() for name, count in counts.items()}


def cut(ids, mask):
    return [row[: int(kept.sum())][None] for row, kept in zip(ids, mask, strict=True)]


def test_loads_leave_padding_out():
    model = scratch("bert")
    rows = expert_loads(model.train(), [{"input_ids": IDS, "attention_mask": MASK}])
    assert model.training
    expected = recount(model.eval(), find_experts(model), [{"input_ids": ids} for ids in cut(IDS, MASK)])
    assert_same({row["site"]: torch.tensor(row["load"], dtype=torch.float64) for row in rows}, expected, "exact")
    padded = expert_loads(model, [{"input_ids": IDS}])
    assert padded[0]["load"] != rows[0]["load"]
    assert [row["tokens"] for row in (*rows, padded[0])] == [int(MASK.sum())] * 2 + [MASK.numel()]
    assert [row["layer"] for row in rows] == [0, 1]
    assert rows[0]["activations"] == ["relu"] * 2 + ["gelu"] + ["learnable_swiglu"] * 3
    assert all(0 < row["entropy"] < torch.tensor(6.0).log() for row in rows)
    assert expert_loads(FAMILIES["bert"].make(), [{"input_ids": IDS}]) == []
    json.dumps(rows, allow_nan=False)


def test_loads_of_each_stack_leave_its_own_padding_out():
    model = scratch("t5", "relu*2,gelu,reglu*3")
    targets = IDS.flip(0)
    kept = MASK.flip(0).bool()  # of the same size as the encoder's: their number can't tell them apart
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": targets.masked_fill(~kept, -100)}
    rows = expert_loads(model, [inputs])
    assert [(row["stack"], row["layer"]) for row in rows] == [(s, n) for s in ("encoder", "decoder") for n in (0, 1)]
    pairs = zip(cut(IDS, MASK), cut(targets, kept), strict=True)
    expected = recount(model, find_experts(model), [{"input_ids": ids, "labels": labels} for ids, labels in pairs])
    assert_same({row["site"]: torch.tensor(row["load"], dtype=torch.float64) for row in rows}, expected, "exact")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expert-reports")
    base, data = save_base(folder / "bert", "bert"), write_dataset(folder / "glue", "sst2")
    return JobOptions(model=base, task="sst2", dataset=str(data), to="geglu", experts="gelu*2,geglu*2", top_k=2)


@pytest.fixture
def trusted(monkeypatch):
    """Leave the reload in a fresh process to other tests."""
    monkeypatch.setattr(job_module, "reloads_equal", lambda *_: True)


def printed(data, show):
    console = Console(width=200, markup=False, highlight=False)
    with console.capture() as shown:
        show(data, console)
    return shown.get()


@pytest.mark.slow
@pytest.mark.usefixtures("trusted")
def test_a_job_with_experts_records_their_loads_and_active_parameters(job, tmp_path):
    output = tmp_path / "run"
    result = finetune_and_report(replace(job, output=str(output)), OPTIONS, baseline=True, finish=write_card)
    saved = json.loads((output / "results.json").read_text())
    assert [row["layer"] for row in saved["experts"]] == [0, 1]
    assert all(sum(row["load"]) == pytest.approx(1) for row in saved["experts"])
    active = active_parameters(hf_glu.checkpoint.loading.load_model(output))
    assert saved["active_parameters"] == active < saved["parameters"]
    assert json.loads((output / "run.json").read_text())["parameters"]["active"] == active
    dense = result["dense"]
    assert (dense["experts"], dense["active_parameters"]) == ([], dense["parameters"])
    assert [row["active_parameters"] for row in result["rows"]] == [dense["parameters"], active, active]
    shown = printed(result, tables.finetuned)
    assert "active a token" in shown
    assert f"{active:,}" in shown
    assert f"of which a token uses {active:,} |" in (output / "README.md").read_text()
    page = report(output)
    assert page.row("Parameters", "active parameters a token")["after"] == f"{active:,}"
    assert "experts.png" in page.pictures
    assert page.row("Load by layer and expert", "encoder 1")["3 geglu"] == f"{saved['experts'][1]['load'][3]:.2%}"


@pytest.mark.slow
@pytest.mark.usefixtures("trusted")
def test_active_parameters_are_shown_only_where_there_are_experts(job, tmp_path):
    plain = finetune_and_report(
        replace(job, experts=None, top_k=None, output=str(tmp_path / "plain")), OPTIONS, finish=write_card
    )
    assert "active" not in printed(plain, tables.finetuned)
    assert "a token uses" not in (tmp_path / "plain" / "README.md").read_text()
    page = report(tmp_path / "plain")
    assert "active" not in [row[0] for row in page.tables["Parameters"]]
    assert "experts.png" not in page.pictures
    result = compare(["dense", "geglu"], [0], replace(job, to=None, output=str(tmp_path / "compare")), OPTIONS)
    assert "active a token" in printed({**result, "report": None}, comparing.classifiers)
    page = report(tmp_path / "compare")
    dense, experts = result["variants"]
    assert page.row("Variants by accuracy", "geglu")["active a token"] == f"{experts['active_parameters']:,}"
    assert experts["active_parameters"] < experts["parameters"]
    assert dense["active_parameters"] == dense["parameters"]


def rows_of(*loads, names=("relu", "relu", "gelu", "swiglu"), stack=None):
    return [
        {"site": f"h.{layer}.mlp", "layer": layer, "stack": stack, "activations": list(names), "load": load,
         "entropy": 1.25, "tokens": 4321}
        for layer, load in enumerate(loads)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    odd = [{"load": [0.5, 0.5], "activations": ["relu"]}, {"load": ["x"], "activations": ["relu"]}, {"load": None}, 3]
    write_run(folder, experts=[*rows_of([0.25] * 4, [0.7, 0.1, 0.2, 0.0]), *odd])
    return report(folder)


def test_the_heat_maps_numbers_are_in_a_table_too(page):
    row = page.row("Load by layer and expert", "1")
    assert row == {
        "layer": "1", "0 relu": "70.00%", "1 relu": "10.00%", "2 gelu": "20.00%", "3 swiglu": "0.00%",
        "entropy": "1.250", "tokens": "4,321", "site": "h.1.mlp",
    }  # fmt: skip
    assert len(page.tables["Load by layer and expert"]) == 3
    assert "25.00% if all experts are used alike" in page.text
    assert any(
        "from 0.00% (expert 3 swiglu in layer 1) to 70.00% (expert 0 relu in layer 1)" in alt for alt in page.alts
    )
    assert {"0 relu", "3 swiglu", "70.0"} <= set(re.findall(r">([^<>]+)</text>", page.html))


def test_an_even_share_has_no_colour_and_the_page_decides_all_colours(page):
    drawing = page.html[page.html.index("Heat map") :].partition("</svg>")[0]
    found = re.findall(r"fill: var\(--series-(\d)\)[^\"]*opacity: ([\d.]+)", drawing)
    cells = [(int(series), float(opacity)) for series, opacity in found]
    # those of the even layer are not even drawn; of the other one 0.7 is as strong as it gets, 0 is 0.25/0.45 of that
    assert cells == [(1, STRONGEST)] + [
        (0, pytest.approx(STRONGEST * off / 0.45, abs=1e-5)) for off in (0.15, 0.05, 0.25)
    ]
    assert not re.search(r"style=\"[^\"]*#[0-9a-f]{6}", page.html)


def blend(colour, paper, opacity):
    parts = [(int(colour[i : i + 2], 16), int(paper[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(opacity * over + (1 - opacity) * under):02x}" for over, under in parts)


def test_a_cells_number_can_be_read_in_both_schemes():
    dark = TEMPLATE.read_text(encoding="utf-8").partition("prefers-color-scheme: dark")[2]
    colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", dark))
    for series, light in enumerate((LESS, MORE)):
        assert contrast(INK, blend(light, PAPER, STRONGEST)) >= 4.5
        assert contrast(colours["ink"], blend(colours[f"series-{series}"], colours["paper"], STRONGEST)) >= 4.5


def test_layers_with_other_experts_get_a_figure_of_their_own(tmp_path):
    other = rows_of([0.4, 0.6], names=("gelu", "swiglu"), stack="decoder")
    write_run(tmp_path / "run", experts=[*rows_of([0.25] * 4, stack="encoder"), *other])
    page = report(tmp_path / "run")
    assert {"experts.png", "experts-1.png"} <= set(page.pictures)
    assert len(by_experts([*rows_of([0.25] * 4), *other])) == 2


def test_many_experts_are_drawn_without_numbers(tmp_path):
    write_run(tmp_path / "run", experts=rows_of([1 / 16] * 16, names=["learnable_swiglu"] * 16))
    page = report(tmp_path / "run")
    labels = set(re.findall(r">([^<>]+)</text>", page.html))
    assert "6.2" not in labels
    assert "15 learnable_s.." in labels
    assert page.row("Load by layer and expert", "0")["15 learnable_swiglu"] == "6.25%"
