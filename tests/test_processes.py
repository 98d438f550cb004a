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
from taskdata import save_base, write_dataset

import hf_glu

SCRIPT = """
import json, sys
import torch
from pathlib import Path
from hf_glu.training.job import Job
from hf_glu.training.options import split_options

values = json.loads(Path(sys.argv[1]).read_text())
job = Job(*split_options(values))
assert job.accelerator.num_processes == int(sys.argv[2]), job.accelerator.num_processes
results = job.run()
if job.main:
    Path(sys.argv[3]).write_text(json.dumps(results))
    torch.save(job.model.state_dict(), sys.argv[3] + ".pt")
"""


def launch(folder: Path, values: dict, processes: int) -> tuple[dict, dict]:
    """Run a job as `accelerate launch` does, on so many processes."""
    (folder / "script.py").write_text("import hf_glu\n" + SCRIPT)
    (folder / "values.json").write_text(json.dumps(values))
    result = folder / f"results-{processes}.json"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--num_processes", str(processes)]
    command += ["--multi_gpu"] if processes > 1 else []  # Accelerate's --cpu would silently run one process
    command += [str(folder / "script.py"), str(folder / "values.json"), str(processes), str(result)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text()), torch.load(f"{result}.pt", weights_only=True)


@pytest.mark.parametrize("family", ["bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_two_processes_train_and_evaluate_as_one(family, tmp_path):
    write_dataset(tmp_path / "data", "rte")
    no_dropout = {"bert": {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}, "t5": {"dropout_rate": 0}}
    base = save_base(tmp_path / "base", family, **no_dropout[family])
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


FSDP = """
import json, sys
import torch
import hf_glu
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification
from hf_glu.training.groups import parameter_groups

torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
ids = torch.arange(24).reshape(4, 6) % 20 + 3
labels = torch.tensor([0, 1, 0, 1])
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["BertLayer"]
)
# Accelerate ignores its FSDP plugin on CPUs: say by hand that this is one
accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.01))
model, optimizer = accelerator.prepare(model, optimizer)
assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
half = slice(accelerator.process_index, None, 2)
for _ in range(3):
    loss = model(input_ids=ids[half], labels=labels[half]).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
state = {key: value.full_tensor().clone() for key, value in model.state_dict().items()}
if accelerator.is_main_process:
    torch.save(state, sys.argv[2])
"""


def test_fsdp_shards_a_converted_model(tmp_path):
    base = save_base(tmp_path / "base", "bert", hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    torch.manual_seed(0)
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base).eval()
    hf_glu.convert(model, "geglu")
    model.save_pretrained(tmp_path / "geglu")
    (tmp_path / "fsdp.py").write_text(FSDP)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", str(tmp_path / "fsdp.py")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "geglu"), str(tmp_path / "state.pt")],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ids = torch.arange(24).reshape(4, 6) % 20 + 3
    labels = torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.AdamW(hf_glu.parameter_groups(model, 1e-3, 0.01))
    for _ in range(3):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sharded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert_same(sharded, {key: value.detach() for key, value in model.state_dict().items()}, "trained")
