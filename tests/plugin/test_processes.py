"""Two real processes: the same evaluation and the same training as one, and FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparing import assert_same
from pico import FAMILIES
from taskdata import save_base, write_dataset
from transformers import BertForSequenceClassification

import hf_glu
from hf_glu.config.experts import ExpertOptions

pytestmark = pytest.mark.slow  # each starts processes that import everything anew

SCRIPT = """
import json, sys
import torch
from pathlib import Path
from hf_glu.training.job import Job
from hf_glu.training.filling import split_options
from hf_glu.training.options import JobOptions, TrainingOptions

values = json.loads(Path(sys.argv[1]).read_text())
job = Job(*split_options(values, JobOptions, TrainingOptions))
assert job.accelerator.num_processes == int(sys.argv[2]), job.accelerator.num_processes
results = job.run()
if job.main:
    Path(sys.argv[3]).write_text(json.dumps(results))
    torch.save(job.model.state_dict(), sys.argv[3] + ".pt")
"""


def launch(folder: Path, values: dict, processes: int, script: str = SCRIPT) -> tuple[dict, dict]:
    """Run a job as `accelerate launch` does, on so many processes."""
    (folder / "script.py").write_text("import hf_glu\n" + script)
    (folder / "values.json").write_text(json.dumps(values))
    result = folder / f"results-{processes}.json"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--num_processes", str(processes)]
    command += ["--multi_gpu"] if processes > 1 else []  # Accelerate's --cpu would silently run one process
    command += [str(folder / "script.py"), str(folder / "values.json"), str(processes), str(result)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, "\n".join(
        line for line in done.stderr.splitlines() if "rank0" in line or "Error" in line
    )[-3000:]
    return json.loads(result.read_text()), torch.load(f"{result}.pt", weights_only=True)


NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    "gpt2": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "t5": {"dropout_rate": 0},
}


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_two_processes_train_and_evaluate_as_one(family, tmp_path):
    write_dataset(tmp_path / "data", "rte")
    base = save_base(tmp_path / "base", family, **NO_DROPOUT[family])
    values = {
        "model": base, "task": "rte", "dataset": str(tmp_path / "data"), "to": {"bert": "geglu", "t5": "reglu"}[family],
        "max_steps": 4, "batch_size": 5, "lr": 1e-3, "precision": "no", "max_length": 32, "eval_batch_size": 3,
        "validation_size": 7, "evaluate_every": 2, "log_every": 1,
    }  # fmt: skip
    one, first = launch(tmp_path, values, 1)
    two, second = launch(tmp_path, values, 2)
    assert two["metrics"] == one["metrics"]
    assert two["examples"] == one["examples"]
    assert two["training"]["loss"] == pytest.approx(one["training"]["loss"], rel=1e-5)
    assert_same(second, first, "trained")


SHARDED = """
import json, sys
import torch
from pathlib import Path
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from hf_glu.training import run as module
from hf_glu.training.job import Job
from hf_glu.training.loop.loop import TrainingLoop
from hf_glu.training.filling import split_options
from hf_glu.training.options import JobOptions, TrainingOptions

plain, seen = module.make_accelerator, []

def make_accelerator(*arguments):
    accelerator = plain(*arguments)
    # Accelerate ignores its FSDP plugin on CPUs: say by hand that this is one
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["BertLayer"]
    )
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    return accelerator

module.make_accelerator = make_accelerator
step = TrainingLoop._step
sharded = lambda model: all(isinstance(p, DTensor) for p in model.parameters())
TrainingLoop._step = lambda self: (seen.append(sharded(self.model)), step(self))[1]
job = Job(*split_options(json.loads(Path(sys.argv[1]).read_text()), JobOptions, TrainingOptions))
assert job.accelerator.num_processes == int(sys.argv[2]) and job.sharded
results = job.run()
assert seen and all(seen), "nothing was sharded"
if job.main:
    Path(sys.argv[3]).write_text(json.dumps(results))
    torch.save(job.model.state_dict(), sys.argv[3] + ".pt")
"""


def test_fsdp_shards_a_converted_model(tmp_path):
    write_dataset(tmp_path / "data", "rte")
    base = save_base(tmp_path / "base", "bert", hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    values = {
        "model": base, "task": "rte", "dataset": str(tmp_path / "data"), "to": "geglu", "max_steps": 4, "batch_size": 6,
        "lr": 1e-3, "precision": "no", "max_length": 32, "eval_batch_size": 3, "evaluate_every": 0,
    }  # fmt: skip
    two, sharded = launch(tmp_path, {**values, "output": str(tmp_path / "run")}, 2, SHARDED)
    assert two["reloaded_equal"] is True
    (tmp_path / "alone").mkdir()
    one, whole = launch(tmp_path / "alone", values, 1)
    assert two["metrics"] == one["metrics"]
    assert_same(sharded, whole, "trained")


def save_experts(folder: Path) -> str:
    """Save a BERT with experts, whose routers have no loss that depends on how a batch is divided."""
    base = save_base(folder / "dense", "bert", hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model = BertForSequenceClassification.from_pretrained(base)
    options = ExpertOptions(groups="gelu*2,geglu*2", balance=0, z=0, bias_rate=0.01)
    hf_glu.convert(model, "geglu", experts=options, check=False)
    model.save_pretrained(base)
    return base


def watched_rows(run: Path) -> list[dict]:
    """Return what a run's log says of its experts, line by line."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row for line in lines if "loss" in line for row in line["watched"]["experts"]]


@pytest.mark.parametrize("script", [SCRIPT, SHARDED], ids=["ddp", "fsdp"])
def test_experts_on_two_processes_are_those_of_one(script, tmp_path):
    write_dataset(tmp_path / "data", "rte")
    values = {
        "model": save_experts(tmp_path), "task": "rte", "dataset": str(tmp_path / "data"), "max_steps": 4,
        "batch_size": 5, "lr": 1e-3, "precision": "no", "max_length": 32, "eval_batch_size": 3, "evaluate_every": 0,
        "log_every": 1,
    }  # fmt: skip
    two, divided = launch(tmp_path, {**values, "output": str(tmp_path / "two")}, 2, script)
    one, whole = launch(tmp_path, {**values, "output": str(tmp_path / "one")}, 1)
    watched, alone = watched_rows(tmp_path / "two"), watched_rows(tmp_path / "one")
    assert len(watched) == 4 * 2
    for row, other in zip(watched, alone, strict=True):
        assert row.pop("router_entropy") == pytest.approx(other.pop("router_entropy"), rel=1e-5)
        assert row == other, "what two processes count is what one does"
    assert two["metrics"] == one["metrics"]
    steps = [key for key in whole if key.endswith("router.steps")]
    assert steps
    assert any(whole[key].any() for key in steps)
    assert_same({k: divided[k] for k in steps}, {k: whole[k] for k in steps}, "bitwise")
    assert_same(*({k: v for k, v in state.items() if v.is_floating_point()} for state in (divided, whole)), "trained")


LANGUAGE = """
import json, sys
import torch
from pathlib import Path
from hf_glu.training.language.job import LanguageRun
from hf_glu.training.language.options import language_options

run = LanguageRun(*language_options(json.loads(Path(sys.argv[1]).read_text())))
assert run.accelerator.num_processes == int(sys.argv[2]), run.accelerator.num_processes
results = run.run()
if run.main:
    Path(sys.argv[3]).write_text(json.dumps(results))
    torch.save(run.model.state_dict(), sys.argv[3] + ".pt")
"""


@pytest.mark.parametrize("objective", ["clm", "mlm", "span"])
def test_two_processes_train_a_language_model_as_one(objective, tmp_path):
    texts = [" ".join(["a film", *["was fine"] * (number % 7), f"or {number}"]) for number in range(30)]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    family = {"clm": "gpt2", "mlm": "bert", "span": "t5"}[objective]
    config = {"model_type": family, **FAMILIES[family].arguments, **NO_DROPOUT[family]}
    values = {
        "config": json.dumps({key: value for key, value in config.items() if "token_id" not in key}),
        "train_tokenizer": 400, "data": [str(tmp_path / "texts.txt")], "validation_share": 0.2, "max_steps": 4,
        "batch_size": 5, "max_length": 16, "precision": "no", "eval_batch_size": 2, "evaluate_every": 2,
    }  # fmt: skip
    one, first = launch(tmp_path, values, 1, LANGUAGE)
    two, second = launch(tmp_path, values, 2, LANGUAGE)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
    assert two["training"]["loss"] == pytest.approx(one["training"]["loss"], rel=1e-5)
    assert_same(second, first, "trained")
