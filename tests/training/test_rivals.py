"""Comparing language models: variants, learning rates, statistics, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from pico import FAMILIES
from taskdata import make_texts
from typed import untyped

from hf_glu.checkpoint.jsonio import read_object
from hf_glu.errors import CheckpointError, HfGluError, OptionError
from hf_glu.publishing.report import write_report
from hf_glu.training.comparing.language import compare_language_models
from hf_glu.training.comparing.statistics import holm, interval, tokens_to
from hf_glu.training.language import job as job_module
from hf_glu.training.language.options import LanguageOptions, LanguageTraining
from hf_glu.training.language.tokenizers import train_tokenizer
from hf_glu.training.results import ComparisonTable

OPTIONS = LanguageTraining(
    max_steps=4, batch_size=4, max_length=32, precision="no", eval_batch_size=8, evaluate_every=1, log_every=1
)
VARIANTS = ("gelu_new", "swiglu:iso")


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "same_when_loaded", lambda *_: True)
    (tmp_path / "texts.txt").write_text("\n\n".join(make_texts()))
    shape = {key: value for key, value in FAMILIES["gpt2"].arguments.items() if "token_id" not in key}
    config = {"model_type": "gpt2", **shape, "n_inner": 96, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    return LanguageOptions(
        config=json.dumps(config), train_tokenizer=300, data=[str(tmp_path / "texts.txt")], output=str(tmp_path / "out")
    )


@pytest.mark.slow
def test_language_models_are_compared(job):
    told: list[str] = []
    table = compare_language_models(VARIANTS, [0, 1], job, OPTIONS, lrs=[1e-3, 1e-2], on_run=told.append)
    assert not untyped(table, ComparisonTable)
    assert table == read_object(job.folder / "compare.json")
    assert next(line for line in told if line.startswith("run ")) == "run 1 of 8: gelu_new, lr 0.001, seed 2"
    dense, gated = table["variants"]
    assert abs(gated["parameters"] / dense["parameters"] - 1) <= 0.01
    assert table["lr_seed"] not in table["seeds"]
    for row in (dense, gated):
        assert row["lr"] == float(min(row["rates"], key=lambda rate: row["rates"][rate]))
        assert len(row["scores"]) == 2
        assert row["mean"] == pytest.approx(sum(row["scores"]) / 2)
        assert all(0 < loss < 1.2 * math.log(300) for loss in row["scores"])
        assert row["flops_per_token"] > 0
    assert (dense["difference"], dense["p_value"], dense["p_holm"]) == (None, None, None)
    assert gated["difference"] == pytest.approx(gated["mean"] - dense["mean"])
    assert gated["p_holm"] == gated["p_value"]  # one test
    # what is finished isn't run again, and nothing made of something else is taken for it
    known = {path: path.stat().st_mtime_ns for path in job.folder.glob("*/results.json")}
    again = compare_language_models(VARIANTS, [0, 1], job, OPTIONS, lrs=[1e-3, 1e-2])
    assert again == table
    assert {path: path.stat().st_mtime_ns for path in known} == known
    with pytest.raises(CheckpointError, match="max_steps"):
        compare_language_models(VARIANTS, [0, 1], job, replace(OPTIONS, max_steps=5), lrs=[1e-3, 1e-2])
    page = write_report(job.folder).read_text()
    assert "swiglu:iso" in page
    assert f"{dense['mean']:.2%}" not in page  # a loss is no share


@pytest.mark.parametrize(
    ("variants", "seeds", "more", "why"),
    [
        (("gelu_new", "swigul"), [0, 1], {}, "did you mean 'swiglu'"),
        (("swiglu", "silu_glu"), [0, 1], {}, "are the same"),
        (("gelu_new", "gelu_pytorch_tanh"), [0, 1], {}, "are the same"),
        (VARIANTS, [0, 0], {}, "given twice"),
        (VARIANTS, [0], {}, "tells no difference from chance"),
        (VARIANTS, [0, 1], {"lrs": [1e-3, 1e-3]}, "given twice"),
        (VARIANTS, [0, 1], {"lrs": [1e-3]}, "nothing to choose from"),
        (VARIANTS, [0, 1], {"lrs": [1e-3, 1e-2], "lr_seed": 1}, "is one of the result's"),
        (VARIANTS, [0, 1], {"lr_seed": 1}, "give lrs"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_run(variants, seeds, more, why, job):
    with pytest.raises(HfGluError, match=why):
        compare_language_models(variants, seeds, job, OPTIONS, **more)
    assert not list(job.folder.glob("*/run.json")) if job.folder.exists() else True


@pytest.mark.slow
@pytest.mark.parametrize(("family", "objective", "metric"), [("gpt2", "clm", "kl"), ("bert", "hidden", "hidden_error")])
def test_taught_models_are_compared_by_what_they_are_taught(family, objective, metric, job, tmp_path):
    for name, seed in (("model", 0), ("teacher", 1)):
        head = "BertModel" if objective == "hidden" else None
        FAMILIES[family].make(head, seed=seed, vocab_size=300).save_pretrained(tmp_path / name)
        train_tokenizer(make_texts(), 300, objective).save_pretrained(tmp_path / name)
    taught = LanguageOptions(
        model=str(tmp_path / "model"), teacher=str(tmp_path / "teacher"), data=job.data, output=job.output
    )
    table = compare_language_models(["dense", FAMILIES[family].exact], [0, 1], taught, replace(OPTIONS, lr=1e-3))
    assert (table["metric"], table["objective"]) == (metric, objective)
    dense = table["variants"][0]
    assert table["target_loss"] == max(dense["scores"])
    for tokens, run in zip(dense["tokens_to_target"], sorted(job.folder.glob("dense-seed*")), strict=True):
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        last = max(line["tokens"] for line in lines)
        assert 0 < tokens <= last  # both end at the target or below it


def test_options_that_would_be_ignored_are_refused(job):
    with pytest.raises(OptionError, match="to='geglu' does nothing in a comparison"):
        compare_language_models(VARIANTS, [0, 1], replace(job, to="geglu"), OPTIONS)


def test_holm_is_what_the_paper_says():
    assert holm([0.01, None, 0.04, 0.03], 3) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.01, None, 0.04], 3) == pytest.approx([0.03, None, 0.08])  # one has no test, and counts
    assert holm([0.5, 0.9], 2) == pytest.approx([1.0, 1.0])
    assert holm([None, 0.2], 1) == [None, 0.2]


def test_intervals_and_tokens():
    low, high = interval([1.0, 2.0, 3.0])
    half = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025)) / math.sqrt(3)  # Student's t, two degrees of freedom
    assert (low, high) == pytest.approx((2 - half, 2 + half))
    assert interval([1.0]) is None
    curve = [(100.0, 5.0), (200.0, 4.0), (300.0, 3.5)]
    assert tokens_to(curve, 4.5) == 150.0
    assert tokens_to(curve, 3.5) == 300.0
    assert tokens_to(curve, 6.0) == 100.0
    assert tokens_to(curve, 1.0) is None
