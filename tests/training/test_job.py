"""Whole jobs: every task with every kind of model, suites, comparisons, mixtures, resuming, the files they leave."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comparing import assert_same
from covering import covering, few
from datasets import Dataset
from short_training import interrupt_at
from taskdata import make_rows, save_base, write_dataset
from transformers import AutoModelForSequenceClassification
from typed import untyped

import hf_glu
from hf_glu.activation import registry
from hf_glu.activation.kernels.compiled import has_compiler
from hf_glu.checkpoint.carrying import without_paths
from hf_glu.checkpoint.files import REPORT_FILE, RUN_FILE, SUITE_FILE
from hf_glu.checkpoint.loading import load_model
from hf_glu.errors import CheckpointError, DataError, NoSiteError, OptionError, TrainingError, UnknownNameError
from hf_glu.publishing.card.card import write_card
from hf_glu.publishing.report import write_report
from hf_glu.tasks import TASKS
from hf_glu.training import job as job_module
from hf_glu.training.baseline import finetune_and_report
from hf_glu.training.comparing.classifiers import compare
from hf_glu.training.comparing.statistics import paired_p
from hf_glu.training.comparing.variants import read_variant
from hf_glu.training.data.prediction import predict
from hf_glu.training.filling import read_yaml, split_options
from hf_glu.training.job import Job, run_job
from hf_glu.training.loop import loop as loop_module
from hf_glu.training.loop.interrupt import Interrupted
from hf_glu.training.options import JobOptions, TrainingOptions
from hf_glu.training.results import ComparisonTable, JobReport, RunEntry, SuiteTable
from hf_glu.training.saving import fresh_predictions
from hf_glu.training.suite import run_suite

TRAINED = [name for name in TASKS if TASKS[name].suite and not TASKS[name].model_of]
OPTIONS = TrainingOptions(
    max_steps=2, batch_size=4, lr=1e-3, max_length=32, precision="no", evaluate_every=0, eval_batch_size=8
)
EXACT = {"bert": "geglu", "gpt2": "geglu_new", "t5": "reglu"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: save_base(folder / family, family, every=True) for family in EXACT}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    for name in TASKS:
        if TASKS[name].suite:
            write_dataset(folder / str(TASKS[name].suite), name)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Check the reload in this process: a fresh one takes seconds to import, and other tests start it."""

    def same(model, tokenizer, folder, features, batch_size):
        again = load_model(folder)
        found = [predict(each.eval(), features, tokenizer, batch_size=batch_size) for each in (again, model)]
        return found[0] == found[1] if features.text else bool((found[0] == found[1]).all())

    monkeypatch.setattr(job_module, "reloads_equal", same)


@pytest.mark.parametrize(("name", "family"), covering(TRAINED, EXACT))
def test_every_task_with_every_family(name, family, bases, datasets):
    task = TASKS[name]
    folder = str(datasets / str(task.suite))
    results = run_job(JobOptions(model=bases[family], task=name, dataset=folder, to=EXACT[family]), OPTIONS)
    assert results["training"]["steps"] == 2
    assert math.isfinite(results["training"]["loss"])
    assert set(results["main"]) == {key.rpartition("/")[2] for key in results["metrics"]} & set(task.main)
    assert -1 <= results["score"] <= 1
    assert results["conversion"]["promise"] == "exact"
    assert len(results["activations"]) >= 2


@pytest.mark.slow
def test_the_whole_job_learns_saves_and_reloads(bases, tmp_path):
    Dataset.from_list(make_rows("movie_reviews", 80)).to_csv(tmp_path / "data.csv")
    output = tmp_path / "run"
    job = JobOptions(model=bases["bert"], dataset=str(tmp_path / "data.csv"), to="geglu", output=str(output))
    result = finetune_and_report(
        job, replace(OPTIONS, max_steps=None, epochs=5, lr=1e-2), baseline=True, finish=write_card
    )
    assert [row["model"] for row in result["rows"]] == ["dense, fine-tuned", "geglu, converted", "geglu, fine-tuned"]
    assert not untyped(json.loads(json.dumps(result)), JobReport)
    assert not untyped(json.loads((output / RUN_FILE).read_text()), RunEntry)
    outcome = result["outcome"]
    assert outcome["reloaded_equal"] is True
    assert outcome["score"] > 0.9
    assert outcome["conversion"]["max_abs_difference"] <= 1e-6
    written = json.loads((output / REPORT_FILE).read_text())
    assert written == json.loads(json.dumps(without_paths(result)))
    assert str(output.parent) not in json.dumps(written)
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(outcome))
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert lines[-1]["evaluation"] == outcome["metrics"]
    assert not list(output.glob("checkpoint-*"))
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.hidden_act == "geglu"
    assert model.config.id2label == {0: "0", 1: "1"}
    once_more = finetune_and_report(JobOptions(model=str(output), dataset=job.dataset), replace(OPTIONS, max_steps=1))
    assert [row["model"] for row in once_more["rows"]] == ["geglu, fine-tuned"]


def test_a_model_that_reloads_as_another_is_an_error(bases, datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "reloads_equal", lambda *_: False)
    folder = str(datasets / "glue")
    job = JobOptions(model=bases["bert"], task="sst2", dataset=folder, to="geglu", output=str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="isn't the one that was evaluated"):
        run_job(job, OPTIONS)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["reloaded_equal"] is False


@pytest.mark.slow
def test_the_check_of_the_reload_can_fail(bases, datasets, tmp_path):
    job = JobOptions(
        model=bases["bert"], task="sst2", dataset=str(datasets / "glue"), to="geglu", output=str(tmp_path / "run")
    )
    made = Job(job, OPTIONS)
    assert made.run()["reloaded_equal"] is True
    features = made.validation["validation"]
    before = fresh_predictions(tmp_path / "run", features, 8)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    model.classifier.bias.data += 1e-3
    model.save_pretrained(tmp_path / "run")
    assert (fresh_predictions(tmp_path / "run", features, 8) != before).any()
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="can't be loaded again"):
        fresh_predictions(tmp_path / "run", features, 8)


DROPOUT = {"bert": {"hidden_dropout_prob": 0.2}, "t5": {"dropout_rate": 0.2}, "gpt2": {"resid_pdrop": 0.2}}


@pytest.mark.parametrize("family", few(EXACT, 3))
def test_a_resumed_run_is_the_uninterrupted_one(family, datasets, tmp_path, monkeypatch, quick):
    base = save_base(tmp_path / "base", family, **DROPOUT[family])
    options = replace(
        OPTIONS, max_steps=7, schedule="cosine", evaluate_every=2, patience=9, log_every=1, accumulate=2, warmup=0.3
    )
    job = JobOptions(model=base, task="rte", dataset=str(datasets / "glue"), to=EXACT[family])
    whole = run_job(replace(job, output=str(tmp_path / "whole")), options)
    parts = replace(job, output=str(tmp_path / "parts"))
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        with pytest.raises(Interrupted, match=r"after step 4.*--resume"):
            run_job(parts, options)
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (tmp_path / "parts" / "config.json").exists()
    with pytest.raises(CheckpointError, match="--resume"):
        run_job(parts, options)
    with pytest.raises(CheckpointError, match="lr="):
        run_job(parts, replace(options, lr=1.0), resume=True)
    resumed = run_job(parts, options, resume=True)
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["training"]["loss"] == whole["training"]["loss"]

    def curve(folder):
        lines = [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]

    assert curve("parts") == curve("whole")
    model = load_model(tmp_path / "whole")
    again = load_model(tmp_path / "parts")
    assert_same(dict(again.state_dict()), dict(model.state_dict()), "bitwise")


@pytest.mark.slow
def test_accumulation_changes_nothing_but_rounding(bases, datasets):
    def weights(accumulate, name):
        base = save_base(
            Path(bases["bert"]).parent / "plain", "bert", hidden_dropout_prob=0, attention_probs_dropout_prob=0
        )
        job = JobOptions(model=base, task=name, dataset=str(datasets / TASKS[name].suite), to="geglu")
        made = Job(job, replace(OPTIONS, accumulate=accumulate, batch_size=5))
        made.fit()
        return {key: value.detach() for key, value in made.model.state_dict().items()}

    for name in ("rte", "copa", "stsb"):
        assert_same(weights(3, name), weights(1, name), "trained")


def test_the_best_is_one_whose_mix_is_annealed(bases, datasets, monkeypatch):
    job = JobOptions(model=bases["bert"], task="sst2", dataset=str(datasets / "glue"), to="learnable_swiglu")
    made = Job(job, replace(OPTIONS, max_steps=12, evaluate_every=2, patience=9, anneal=0.5))
    scores, kept = iter([0.9, 0.9, 0.9, 0.4, 0.5, 0.3, 0.1]), []

    def evaluate(model, title):
        kept.append({key: value.detach().clone() for key, value in model.state_dict().items()})
        return {"accuracy": 0.0}, next(scores)

    monkeypatch.setattr(made, "evaluate", evaluate)
    monkeypatch.setattr(made, "fold", lambda: None)
    made.fit()
    assert [float(next(v for k, v in state.items() if "annealed" in k)) for state in kept[2:5]] == [
        pytest.approx(10 / 11), 1.0, 1.0
    ]  # fmt: skip
    assert_same(dict(made.model.state_dict()), kept[4], "bitwise")


def test_early_stopping_takes_the_best(bases, datasets, monkeypatch):
    job = JobOptions(model=bases["bert"], task="sst2", dataset=str(datasets / "glue"), to="geglu")
    made = Job(job, replace(OPTIONS, max_steps=20, evaluate_every=2, patience=2))
    scores = iter([0.5, 0.9, 0.1, 0.2, 0.3])
    kept = []

    def evaluate(model, title):
        kept.append({key: value.detach().clone() for key, value in model.state_dict().items()})
        return {"accuracy": 0.0}, next(scores)

    monkeypatch.setattr(made, "evaluate", evaluate)
    _, trained = made.fit()
    assert trained.stopped_early
    assert trained.steps == 8
    assert_same(dict(made.model.state_dict()), kept[1], "bitwise")


def test_a_loss_that_is_nan_stops_with_its_step(bases, datasets, monkeypatch):
    job = JobOptions(model=bases["bert"], task="sst2", dataset=str(datasets / "glue"), to="geglu")
    made = Job(job, replace(OPTIONS, max_steps=20))
    plain = loop_module.TrainingLoop._step

    def step(self):
        loss = plain(self)
        return loss * math.nan if self.progress.step == 5 else loss

    monkeypatch.setattr(loop_module.TrainingLoop, "_step", step)
    with pytest.raises(TrainingError, match="nan at step 6: try a lower lr"):
        made.fit()


def test_a_gradient_that_is_nan_in_the_last_step_is_no_result(bases, datasets):
    made = Job(job := JobOptions(model=bases["bert"], task="sst2", dataset=str(datasets / "glue"), to="geglu"), OPTIONS)
    assert job.output is None, "there is nothing that would be loaded again and compared"
    backward: list[int] = []

    def spoil(grad):
        backward.append(1)
        return grad * math.nan if len(backward) == OPTIONS.max_steps else grad

    made.model.classifier.weight.register_hook(spoil)
    with pytest.raises(TrainingError, match=r"gradient's norm is nan at step 2: try a lower lr"):
        made.run()


@pytest.mark.parametrize(
    ("family", "rows", "more", "says"),
    [
        ("gpt2", {20: ""}, {}, "data: the tokenizer makes nothing of row 21, '': leave it out"),
        ("bert", {3: "  "}, {"train_size": 8}, "data: the tokenizer makes nothing of row 4, '  ': leave it out"),
        (
            "bert",
            {},
            {"task": "stsb", "validation_size": 1},
            "stsb, split validation: the rows to validate on have one score",
        ),
    ],
)
def test_data_that_can_not_be_used_are_refused_at_once(family, rows, more, says, bases, datasets, tmp_path):
    texts = [{"text": rows.get(n, "a fine film"), "label": "xy"[n % 2]} for n in range(24)]
    Dataset.from_list(texts).to_json(tmp_path / "data.jsonl")
    Dataset.from_list(texts[:2]).to_json(tmp_path / "validation.jsonl")
    own = {"dataset": str(tmp_path / "data.jsonl"), "validation": str(tmp_path / "validation.jsonl")}
    source = {"dataset": str(datasets / "glue")} if "task" in more else own
    output = tmp_path / "run"
    with pytest.raises(DataError, match=re.escape(says)):
        run_job(JobOptions(model=bases[family], output=str(output), **source, **more), OPTIONS)
    assert not output.exists()


def test_learnable_activations_are_annealed_and_folded(bases, datasets, tmp_path, quick):
    job = JobOptions(
        model=bases["bert"], task="sst2", dataset=str(datasets / "glue"), to="learnable_swiglu",
        output=str(tmp_path / "run"),
    )  # fmt: skip
    results = run_job(job, replace(OPTIONS, anneal=0.5, max_steps=4))
    assert results["reloaded_equal"] is True
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["hidden_act"] == "swiglu"
    assert "mix" not in config["hf_glu"]
    with pytest.raises(OptionError, match="learnable"):
        run_job(replace(job, to="geglu", output=None), replace(OPTIONS, anneal=0.5))


@pytest.mark.parametrize("kind", ["lora", "gates"])
def test_peft(kind, bases, datasets, tmp_path, quick):
    job = JobOptions(
        model=bases["bert"], task="sst2", dataset=str(datasets / "glue"), to="geglu", peft=kind,
        output=str(tmp_path / "run"),
    )  # fmt: skip
    results = run_job(job, OPTIONS)
    assert results["reloaded_equal"] is True
    assert 0 < results["trainable"] < results["parameters"]
    assert (tmp_path / "run" / "adapter").is_dir() == (kind == "lora")


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"precision": "bf16"}, {"deterministic": True}])
def test_other_ways_to_train(change, bases, datasets):
    try:
        results = run_job(
            JobOptions(model=bases["gpt2"], task="sst2", dataset=str(datasets / "glue"), to="swiglu"),
            replace(OPTIONS, **change),
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert math.isfinite(results["training"]["loss"])


@pytest.mark.parametrize(("family", "peft"), [("bert", "none"), ("t5", "none"), ("bert", "gates")])
def test_saving_memory_trains_the_same(family, peft, bases, datasets):
    job = JobOptions(model=bases[family], task="sst2", dataset=str(datasets / "glue"), to=EXACT[family], peft=peft)
    plain, lean = (run_job(job, replace(OPTIONS, save_memory=save)) for save in (False, True))
    assert plain["training"]["loss"] == lean["training"]["loss"]
    assert plain["metrics"] == lean["metrics"]


@pytest.mark.slow  # compiles for half a minute where nothing is compiled yet; gates alone are in tests/ffn/test_lean.py
@pytest.mark.skipif(not has_compiler("cpu"), reason="torch finds no C++ compiler")
def test_fused_gates_train_the_same_up_to_rounding(bases, datasets):
    job = JobOptions(model=bases["bert"], task="sst2", dataset=str(datasets / "glue"), to="geglu")
    plain, fused = (run_job(job, replace(OPTIONS, fuse=fuse))["training"]["loss"] for fuse in (False, True))
    assert fused == pytest.approx(plain, rel=1e-5)
    assert math.isfinite(run_job(replace(job, peft="lora"), replace(OPTIONS, fuse=True))["training"]["loss"])


def test_lora_keeps_what_it_is_given(bases, datasets):
    job = JobOptions(model=bases["bert"], task="sst2", dataset=str(datasets / "glue"), to="geglu", peft="lora")
    with pytest.raises(OptionError, match="peft=lora"):
        run_job(job, replace(OPTIONS, save_memory=True))
    assert math.isfinite(run_job(job, OPTIONS)["training"]["loss"])


@pytest.mark.parametrize("change", [{"save_memory": True}, {"fuse": True}])
def test_a_dense_model_has_no_gates_to_save_or_fuse(change, bases, datasets, tmp_path):
    job = JobOptions(model=bases["bert"], task="sst2", dataset=str(datasets / "glue"), output=str(tmp_path / "run"))
    with pytest.raises(NoSiteError, match="convert"):
        run_job(job, replace(OPTIONS, **change))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_compiled_run_saves_the_plain_model(bases, datasets, tmp_path):
    job = JobOptions(
        model=bases["bert"], task="sst2", dataset=str(datasets / "glue"), to="geglu", output=str(tmp_path / "run")
    )
    assert run_job(job, replace(OPTIONS, compile=True))["reloaded_equal"] is True


@pytest.mark.parametrize("suite", few(["glue", "superglue"], 2))
def test_a_suite_resumes_and_writes_its_table(suite, bases, datasets, tmp_path, quick):
    job = JobOptions(
        model=bases["bert"], dataset=str(datasets / suite), to="geglu", output=str(tmp_path / "suite"), predict=True
    )
    only = {"glue": ["mnli", "stsb"], "superglue": ["superglue_rte", "copa"]}[suite]
    first = run_suite(suite, job, OPTIONS, only=only[:1])
    assert first["partial"]
    ran = []

    def counted(job, options, **more):
        ran.append(job.task)
        return run_job(job, options, **more)

    table = run_suite(suite, job, OPTIONS, only=only, run=counted)
    assert ran == only[1:]
    assert set(table["tasks"]) == set(only)
    assert table["score"] == pytest.approx(sum(r["score"] for r in table["tasks"].values()) / 2)
    assert "partial" in (tmp_path / "suite" / "results.md").read_text()
    assert (tmp_path / "suite" / "results.csv").read_text().startswith("task,metric,value\n")
    written = {path.name for path in (tmp_path / "suite" / "predictions").iterdir()}
    assert written > {"glue": {"MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"}, "superglue": {"AX-b.jsonl", "AX-g.jsonl"}}[suite]
    assert f"{suite}.zip" in written
    assert not untyped(json.loads((tmp_path / "suite" / SUITE_FILE).read_text()), SuiteTable)
    with pytest.raises(CheckpointError, match="activation"):
        run_suite(suite, replace(job, to="swiglu"), OPTIONS)


def test_a_suite_of_a_model_as_it_is_names_the_activation_that_it_has(bases, datasets, tmp_path):
    found = {"activations": [{"activation": "gelu"}] * 2, "metrics": {}, "score": 0.5}
    job = JobOptions(model=bases["bert"], dataset=str(datasets / "glue"), output=str(tmp_path / "suite"))
    assert run_suite("glue", job, OPTIONS, only=["sst2"], run=lambda *args, **more: found)["activation"] == "gelu"


@pytest.mark.slow
def test_a_mixture_of_tasks(bases, datasets):
    job = JobOptions(model=bases["t5"], mixture="superglue", dataset=str(datasets / "superglue"), to="reglu")
    results = run_job(replace(job, train_size=4, validation_size=4), OPTIONS)
    assert results["examples"]["train"] == 4 * 8
    assert {key.split("/")[0] for key in results["metrics"]} == {n for n in TRAINED if TASKS[n].suite == "superglue"}
    with pytest.raises(OptionError, match="text-to-text"):
        run_job(replace(job, model=bases["bert"]), OPTIONS)


@pytest.mark.slow
def test_comparison(bases, datasets, tmp_path, quick):
    job = JobOptions(
        model=bases["bert"], task="sst2", dataset=str(datasets / "glue"), output=str(tmp_path / "compare"),
        calibration=16,
    )  # fmt: skip
    variants = ["dense", "geglu", "random-geglu", "swiglu:iso"]
    table = compare(variants, [0, 1], job, OPTIONS)
    assert [row["name"] for row in table["variants"]] == variants
    assert table["variants"][0]["difference"] is None
    assert all(len(row["scores"]) == 2 for row in table["variants"])
    sizes = {row["name"]: row["parameters"] for row in table["variants"]}
    assert sizes["random-geglu"] == sizes["geglu"] > sizes["swiglu:iso"]
    assert json.loads((tmp_path / "compare" / "compare.json").read_text())["metric"] == "accuracy"
    assert not untyped(json.loads(json.dumps(table)), ComparisonTable)
    geglu = load_model(tmp_path / "compare" / "geglu-seed0")
    random = load_model(tmp_path / "compare" / "random-geglu-seed0")
    pairs = zip(hf_glu.find_sites(geglu), hf_glu.find_sites(random), strict=True)
    assert all((a.out_proj.weight - b.out_proj.weight).abs().max() > 0.01 for a, b in pairs)
    assert compare(variants, [0, 1], job, OPTIONS)["variants"] == table["variants"]
    page = write_report(tmp_path / "compare").read_text()
    assert all(name in page.split("First seed of each variant")[1] for name in variants)
    with pytest.raises(CheckpointError, match="task"):
        compare(variants, [0], replace(job, task="rte"), OPTIONS)


def test_paired_test_and_variants():
    assert paired_p([0.8, 0.9, 0.85], [0.7, 0.85, 0.8]) == pytest.approx(0.057, abs=5e-3)  # t = 4, two degrees
    assert paired_p([0.8], [0.7]) is None
    assert paired_p([0.8, 0.9], [0.7, 0.8]) is None  # the same difference each time
    assert read_variant("random-swiglu:iso").width == "iso"
    with pytest.raises(UnknownNameError, match="geglu"):
        read_variant("gegl")
    with pytest.raises(OptionError, match="such as dense"):
        read_variant(":iso")


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"model": "x", "lerning_rate": 1.0}, UnknownNameError, "did you mean|valid"),
        ({"lr": "fast"}, OptionError, "lr must be float"),
        ({"batch_size": 1.5}, OptionError, "batch_size must be int"),
        ({"warmup": 2}, OptionError, "warmup"),
        ({"schedule": "step"}, OptionError, "linear"),
        ({"peft": "adapter"}, OptionError, "lora"),
        ({"random": True}, OptionError, "to"),
        ({"epochs": 0}, OptionError, "epochs"),
        ({"tracker": "mlflow"}, OptionError, "tensorboard"),
        ({"weight_decay": -1.0}, OptionError, "weight_decay must be 0 or more"),
        ({"weight_decay": math.nan}, OptionError, "weight_decay must be 0 or more"),
        ({"activation_lr": 0.0}, OptionError, "activation_lr must be more than 0"),
        ({"evaluate_every": -1}, OptionError, "evaluate_every must be 0 or more"),
        ({"distill_steps": -3, "to": "geglu"}, OptionError, "distill_steps must be 0 or more"),
        ({"seed": -1}, OptionError, "seed must be a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, OptionError, "seed must be a whole number"),
    ],
)
def test_options(values, error, says):
    with pytest.raises(error, match=says):
        split_options(values, JobOptions, TrainingOptions)


def test_options_read_what_yaml_writes():
    job, options = split_options(
        {"lr": "2e-5", "width": 1024, "epochs": 3, "max_steps": None, "compile": False},
        JobOptions, TrainingOptions,
    )  # fmt: skip
    assert (options.lr, options.epochs, options.max_steps, job.units) == (2e-5, 3.0, None, 1024)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"task": None, "dataset": None}, OptionError, "give a task"),
        ({"task": "ax"}, OptionError, "mnli"),
        ({"form": "text"}, OptionError, "encoder-decoder"),
        ({"dataset": "nowhere"}, DataError, "nowhere"),
        ({"model": "nowhere"}, CheckpointError, "nowhere"),
    ],
)
def test_bad_jobs(change, error, says, bases, datasets, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    job = JobOptions(model=bases["bert"], task="sst2", dataset=str(datasets / "glue"))
    with pytest.raises(error, match=says):
        run_job(replace(job, **change), OPTIONS)


def test_too_long_for_the_model_and_trackers(bases, datasets, tmp_path):
    job = JobOptions(model=bases["bert"], task="sst2", dataset=str(datasets / "glue"))
    with pytest.raises(OptionError, match="reads 64 tokens"):
        run_job(job, replace(OPTIONS, max_length=128))
    text = replace(job, model=bases["t5"])
    with pytest.raises(OptionError, match="max_length=1 leaves no room for a text beside 1 special tokens"):
        run_job(text, replace(OPTIONS, max_length=1))
    with pytest.raises(OptionError, match="pip install wandb"):
        run_job(job, replace(OPTIONS, tracker="wandb"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="choose another output"):
        run_job(replace(job, output=str(tmp_path / "full")), OPTIONS)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "hf_glu" / "training" / "configs").glob("*.yaml")))
def test_the_recipes_options_are_valid(path):
    job, options = split_options(read_yaml(path), JobOptions, TrainingOptions)
    family, *middle, suite = path.stem.split("-")
    assert job.model
    assert job.to
    assert (job.width == "iso") == (middle[0] == "iso")
    assert f"--suite {suite}" in path.read_text()
    assert options.max_length == {"glue": 128, "superglue": 256}[suite]
    assert family in job.model
    assert registry[job.to]
