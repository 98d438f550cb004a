"""A finished run is taken for another one only where both are made of the same; no option is silently ignored."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from taskdata import make_rows, save_base, vocabulary, write_dataset
from transformers import MixtralConfig, MixtralForCausalLM

import hf_glu
from hf_glu.checkpoint.files import RESULTS_FILE, RUN_FILE
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.checkpoint.loading import load_model
from hf_glu.errors import CheckpointError, OptionError
from hf_glu.ffn.experts.group import Bank
from hf_glu.tasks.choices import OF_OWN_DATA
from hf_glu.training import record
from hf_glu.training.baseline import finetune_and_report
from hf_glu.training.comparing import classifiers, shared
from hf_glu.training.comparing.classifiers import compare
from hf_glu.training.data import models
from hf_glu.training.data.sources import task_name
from hf_glu.training.job import Job, run_job
from hf_glu.training.options import JobOptions, TrainingOptions
from hf_glu.training.record import FREE, make_record
from hf_glu.training.saving import run_entry
from hf_glu.training.suite import run_suite

OPTIONS = TrainingOptions(max_steps=1, batch_size=4, max_length=32, precision="no", evaluate_every=0)
# another value of each training option
OTHER = {
    "epochs": 2.0, "max_steps": 2, "batch_size": 8, "accumulate": 2, "eval_batch_size": 8, "lr": 1e-3,
    "schedule": "cosine", "warmup": 0.1, "weight_decay": 0.1, "activation_lr": 1e-3, "clip": 2.0, "max_length": 16,
    "precision": "bf16", "evaluate_every": 5, "patience": 3, "anneal": 0.5, "gradient_checkpointing": True,
    "save_memory": True, "tile": 64, "fuse": True, "compile": True, "deterministic": True,
}  # fmt: skip
OTHER_JOB = {
    "to": "swiglu", "width": "iso", "layers": "0", "exclude": "1", "calibration": 9, "form": "classes", "peft": "gates",
    "train_size": 4, "validation_size": 4, "predict": True, "base_model": "another", "experts": "2",
}  # fmt: skip


@pytest.fixture
def job(tmp_path):
    model = save_base(tmp_path / "model")
    for name in ("rte", "mrpc"):
        write_dataset(tmp_path / "data", name)
    return JobOptions(model=model, dataset=str(tmp_path / "data"), to="geglu", output=str(tmp_path / "out"))


def instead_of_training(ran):
    """Return a stand-in for `run_job` that writes what a run writes, and nothing else."""

    def run(job, options, *, resume=False, made_of=None):
        folder = Path(job.output)
        folder.mkdir(parents=True)
        ran.append(folder.name)
        results = {"score": float(len(ran)), "metrics": {"accuracy": 0.5}, "main": ["accuracy"], "parameters": 1,
                   "active_parameters": 1, "training": {"seconds": 1.0}}  # fmt: skip
        write_json(folder / RUN_FILE, run_entry(job, options, made_of or make_record(job, options), task_name(job)))
        write_json(folder / RESULTS_FILE, results)
        return results

    return run


def test_every_option_is_in_a_record_or_free():
    fields = {each.name for kind in (JobOptions, TrainingOptions) for each in dataclasses.fields(kind)}
    assert fields - FREE == {*OTHER, *OTHER_JOB, "seed", "task", "mixture", "mixture_limit", *OF_OWN_DATA, "top_k",
                             "random", "distill_steps", "max_target_length",
                             "lora_rank", "lora_targets"}  # fmt: skip


def change_file(path, change):
    times = path.stat()
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_suite_takes_what_is_made_of_the_same(job, tmp_path):
    ran = []
    only, run = ["rte", "mrpc"], instead_of_training(ran)
    first = run_suite("glue", job, OPTIONS, only=only, run=run)
    assert run_suite("glue", job, OPTIONS, only=only, run=run) == first
    shutil.copytree(tmp_path / "model", tmp_path / "model too")
    shutil.move(tmp_path / "data", tmp_path / "moved")
    (tmp_path / "model too" / "README.md").write_text("a card")
    moved = replace(job, model=str(tmp_path / "model too"), dataset=str(tmp_path / "moved"))
    again = run_suite("glue", moved, replace(OPTIONS, log_every=3, tracker="wandb"), only=only, run=run)
    assert again["tasks"] == first["tasks"]
    assert sorted(ran) == sorted(only)


# what a difference in an option is called, where that isn't its name
CALLED = {"to": "activation='geglu', not 'swiglu'", "precision": "mixed_precision=", "patience": "evaluate_every="}


def test_a_suite_refuses_another_option(job):
    ran = []
    run_suite("glue", job, OPTIONS, only=["rte"], run=instead_of_training(ran))
    for key, value in {**OTHER, **OTHER_JOB, "seed": 1}.items():
        more = {"evaluate_every": 4} if key == "patience" else {}
        now = replace(job, **{key: value}) if key in OTHER_JOB else job
        options = OPTIONS if key in OTHER_JOB else replace(OPTIONS, **{key: value, **more})
        with pytest.raises(CheckpointError, match=f"rte has a run with {CALLED.get(key, f'{key}=')}"):
            run_suite("glue", now, options, only=["mrpc"], run=instead_of_training(ran))
    assert ran == ["rte"]


CHANGES = {
    "data/rte/train-00000-of-00001.parquet": "another data: rte train has changed",
    "data/rte/validation-00000-of-00001.parquet": "another data: rte validation has changed",
    "model/model.safetensors": "another model: model.safetensors has changed",
    "model/config.json": "another model: config.json has changed",
    "model/tokenizer.json": "another model: tokenizer.json has changed",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_suite_refuses_other_files_of_the_same_size_and_time(name, job, tmp_path):
    ran = []
    run_suite("glue", job, OPTIONS, only=["rte"], run=instead_of_training(ran))
    change_file(tmp_path / name, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=CHANGES[name]):
        run_suite("glue", job, OPTIONS, only=["rte", "mrpc"], run=instead_of_training(ran))
    assert ran == ["rte"]


def test_a_suite_refuses_new_files_and_versions(job, tmp_path, monkeypatch):
    run_suite("glue", job, OPTIONS, only=["rte"], run=instead_of_training([]))
    with monkeypatch.context() as patched:
        patched.setattr(record, "version", lambda name: "9" if name == "torch" else record_version(name))
        with pytest.raises(CheckpointError, match=r"torch=.*, not '9'"):
            run_suite("glue", job, OPTIONS, only=["rte"])
    (tmp_path / "model" / "added_tokens.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"added_tokens\.json is new"):
        run_suite("glue", job, OPTIONS, only=["rte"])
    entry = json.loads((tmp_path / "out" / "rte" / RUN_FILE).read_text())
    del entry[record.MADE_OF]
    write_json(tmp_path / "out" / "rte" / RUN_FILE, entry)
    with pytest.raises(CheckpointError, match="doesn't say what it was made of"):
        run_suite("glue", job, OPTIONS, only=["rte"])


record_version = record.version


def test_a_suite_is_all_of_its_tasks(job):
    with pytest.raises(OptionError, match="task=rte"):
        run_suite("glue", replace(job, task="rte"), OPTIONS)
    with pytest.raises(OptionError, match="task and mixture"):
        run_suite("glue", replace(job, mixture="glue"), OPTIONS, only=["rte"])


@pytest.fixture
def rte(job, monkeypatch):
    monkeypatch.setattr(shared, "convert", partial(hf_glu.convert, distill_steps=2))
    return replace(job, to=None, task="rte", calibration=8)


def test_a_comparison_takes_what_is_made_of_the_same(rte, monkeypatch):
    ran = []
    monkeypatch.setattr(classifiers, "run_job", instead_of_training(ran))
    first = compare(["dense", "swiglu:iso"], [0, 1], rte, OPTIONS)
    assert compare(["dense", "swiglu:iso"], [0, 1], rte, OPTIONS) == first
    assert ran == ["dense-seed0", "swiglu-iso-seed0", "dense-seed1", "swiglu-iso-seed1"]
    compare(["geglu", "dense", "swiglu:iso"], [1, 2], rte, OPTIONS)
    assert ran[4:] == ["geglu-seed1", "geglu-seed2", "dense-seed2", "swiglu-iso-seed2"]


@pytest.mark.parametrize("key", ["epochs", "lr", "eval_batch_size", "train_size", "layers", "peft", "calibration"])
def test_a_comparison_refuses_another_option(key, rte, monkeypatch):
    ran = []
    monkeypatch.setattr(classifiers, "run_job", instead_of_training(ran))
    compare(["dense", "geglu"], [0], rte, OPTIONS)
    changed = {**OTHER, **OTHER_JOB}[key]
    now = replace(rte, **{key: changed}) if key in OTHER_JOB else rte
    options = replace(OPTIONS, **{key: changed}) if key in OTHER else OPTIONS
    with pytest.raises(CheckpointError, match=f"{key}=.*, not"):
        compare(["dense", "geglu"], [0, 1], now, options)
    if key != "layers":  # those of converted models only: others in the folder may have others
        with pytest.raises(CheckpointError, match=f"{key}=.*, not"):
            compare(["swiglu:iso"], [7], now, options)
    assert ran == ["dense-seed0", "geglu-seed0"]


@pytest.mark.parametrize("name", CHANGES)
def test_a_comparison_refuses_other_files(name, rte, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(classifiers, "run_job", instead_of_training(ran))
    compare(["dense"], [0], rte, OPTIONS)
    change_file(tmp_path / name, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=CHANGES[name]):
        compare(["geglu"], [1], rte, OPTIONS)
    assert ran == ["dense-seed0"]


def test_a_fitted_conversion_is_made_of_the_same_and_untouched(rte, tmp_path, monkeypatch):
    monkeypatch.setattr(classifiers, "run_job", instead_of_training([]))
    compare(["swiglu:iso"], [0], rte, OPTIONS)
    shutil.rmtree(tmp_path / "out" / "swiglu-iso-seed0")
    with pytest.raises(CheckpointError, match=r"converted/swiglu-iso has a run with calibration=8, not 9"):
        compare(["swiglu:iso"], [0], replace(rte, calibration=9), OPTIONS)
    change_file(tmp_path / "out/converted/swiglu-iso/model.safetensors", lambda content: content[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        compare(["swiglu:iso"], [0], rte, OPTIONS)


@pytest.mark.parametrize(
    ("variants", "says"),
    [
        (["dense", "geglu", "dense"], "dense and dense"),
        (["geglu", "geglu:keep"], "geglu and geglu:keep"),
        (["swiglu:iso", "silu_glu:iso"], "swiglu:iso and silu_glu:iso"),
        (["swiglu:24", "swiglu:024"], "swiglu:24 and swiglu:024"),
    ],
)
def test_equal_variants_are_refused(variants, says, rte, tmp_path):
    with pytest.raises(OptionError, match=f"the variants {says} are the same"):
        compare(variants, [0], rte, OPTIONS)
    assert not (tmp_path / "out").exists()


def test_what_variants_and_seeds_say_is_refused(rte):
    for key, value in {"to": "geglu", "width": "iso", "random": True}.items():
        more = {"to": "geglu"} if key == "random" else {}
        with pytest.raises(OptionError, match="does nothing in a comparison"):
            compare(["dense"], [0], replace(rte, **{key: value, **more}), OPTIONS)
    with pytest.raises(OptionError, match="seed=3 does nothing in a comparison"):
        compare(["dense"], [0], rte, replace(OPTIONS, seed=3))
    with pytest.raises(OptionError, match="the seed 0 is given twice"):
        compare(["dense"], [0, 1, 0], rte, OPTIONS)


def test_a_resumed_run_is_made_of_the_same(rte, tmp_path, monkeypatch):
    made = Job(rte, OPTIONS)
    made.folder.mkdir()
    write_json(made.folder / RUN_FILE, made.entry)
    with monkeypatch.context() as patched:
        patched.setattr(record, "version", lambda name: "9")
        Job(rte, replace(OPTIONS, eval_batch_size=8, log_every=2), resume=True)
    with pytest.raises(CheckpointError, match="peft='none', not 'lora'"):
        Job(replace(rte, peft="lora"), OPTIONS, resume=True)
    with pytest.raises(CheckpointError, match=r"lr=2e-05, not 0\.1"):
        Job(rte, replace(OPTIONS, lr=0.1), resume=True)
    train = tmp_path / "data" / "rte" / "train-00000-of-00001.parquet"
    Dataset.from_list(make_rows("rte", 16, seed=7)).to_parquet(train)
    with pytest.raises(CheckpointError, match="another data: rte train has changed"):
        Job(rte, OPTIONS, resume=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"to": None, "width": "iso"}, "width='iso' does nothing without to"),
        ({"to": None, "layers": "0"}, "layers='0' does nothing without to or experts"),
        ({"to": None, "exclude": "1"}, "exclude='1' does nothing without to or experts"),
        ({"top_k": 1}, "top_k=1 does nothing without experts"),
        ({"experts": "2", "random": True}, "random and experts exclude each other"),
        ({"mixture_limit": 9}, "mixture_limit=9 does nothing without mixture"),
        ({"validation": "more.csv"}, "task and validation exclude each other"),
        ({"texts": "text"}, "task and texts exclude each other"),
        ({"mixture": "glue"}, "task and mixture exclude each other"),
        ({"output": None, "predict": True}, "predict=True does nothing without output"),
        ({"lora_rank": 4}, "without peft=lora"),
        ({"lora_targets": "in", "peft": "gates"}, "without peft=lora"),
        ({"to": None, "experts": "2"}, "one target, such as swiglu"),
    ],
)
def test_no_option_is_ignored(change, says, job, tmp_path):
    with pytest.raises(OptionError, match=says):
        run_job(replace(job, task="rte", **change), OPTIONS)
    assert not (tmp_path / "out").exists()


def test_patience_and_baseline_are_not_ignored_either(job):
    with pytest.raises(OptionError, match="evaluate_every=0"):
        replace(OPTIONS, patience=2)
    with pytest.raises(OptionError, match="baseline"):
        finetune_and_report(replace(job, task="rte", to=None), OPTIONS, baseline=True)


def test_a_conversion_to_experts_has_the_width_that_it_is_given(job, monkeypatch):
    monkeypatch.setattr(models, "convert", partial(hf_glu.convert, distill_steps=2))
    made = Job(replace(job, task="rte", to="swiglu", experts="swiglu*2", width="24", calibration=8), OPTIONS)
    assert {module.width for module in made.model.modules() if isinstance(module, Bank)} == {24}


@pytest.mark.slow
def test_banks_of_experts_are_fine_tuned(job, tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(vocabulary()), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    mine = replace(job, task="rte", to=None, experts="silu*1,relu*1")
    result = finetune_and_report(mine, OPTIONS)
    assert result["outcome"]["reloaded_equal"] is True
    assert [row["model"] for row in result["rows"]] == ["silu*1,relu*1, converted", "silu*1,relu*1, fine-tuned"]
    assert load_model(tmp_path / "out").config.hf_glu["experts"]


def test_a_model_that_is_not_kept_is_said_before_training(job, monkeypatch, caplog):
    def train(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Job, "run", train)
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        finetune_and_report(replace(job, task="rte", output=None), OPTIONS)
    assert "without an output folder the model is trained and evaluated, and not kept" in caplog.text


def test_predictions_that_can_not_be_written_are_refused_before_training(job, tmp_path):
    rows = [{"text": "fine", "label": number % 2} for number in range(9)]
    Dataset.from_list(rows).to_json(tmp_path / "own.jsonl")
    with pytest.raises(OptionError, match="own has no leaderboard"):
        run_job(replace(job, dataset=str(tmp_path / "own.jsonl"), predict=True), OPTIONS)
    (tmp_path / "data" / "rte" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(OptionError, match="rte has no test split test"):
        run_job(replace(job, task="rte", predict=True), OPTIONS)
    assert not (tmp_path / "out").exists()
