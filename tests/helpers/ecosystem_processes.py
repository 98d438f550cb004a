"""Tools of several processes: each cell runs in two, started once for all; run as a script, it is one of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ecosystem import KINDS, Make, answers, gradients, ids, make, saved
from torch import Tensor

ROWS = ids(4, 10, seed=5)
PROCESSES = 2


def _step(model: Any, rows: Tensor) -> None:
    logits = model(input_ids=rows)["logits"][:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten()).backward()


def _alone(build: Make) -> dict[str, Tensor]:
    """Return the gradients of the mean of both processes' losses, in one."""
    model = build().train()
    for rows in ROWS.chunk(PROCESSES):
        logits = model(input_ids=rows).logits[:, :-1].flatten(0, 1)
        (torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten()) / PROCESSES).backward()
    return gradients(model)


def fsdp(build: Make, folder: Path) -> tuple[Any, Any]:
    """FSDP2, ``fully_shard`` of each layer and of the model."""
    from torch.distributed.fsdp import fully_shard

    model = build().train()
    for layer in model.base_model.layers:
        fully_shard(layer)
    fully_shard(model)
    _step(model, ROWS.chunk(PROCESSES)[dist.get_rank()])
    return {name: grad.full_tensor() for name, grad in gradients(model).items()}, _alone(build)


def ddp(build: Make, folder: Path) -> tuple[Any, Any]:
    """DDP with ``static_graph=True``."""
    model = build().train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model, static_graph=True)
    for _ in range(2):  # the first pass is what the graph is
        model.zero_grad()
        _step(wrapped, ROWS.chunk(PROCESSES)[dist.get_rank()])
    return gradients(model), _alone(build)


def _parallel(build: Make, folder: Path, **plan: Any) -> tuple[Any, Any]:
    from transformers.distributed import DistributedConfig

    expected = answers(model := build())
    places = [saved(model, folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(places)
    config = DistributedConfig(**plan)
    found = type(model).from_pretrained(places[0], distributed_config=config).eval()
    return answers(found), expected


def tensor_parallel(build: Make, folder: Path) -> tuple[Any, Any]:
    """``from_pretrained(distributed_config=DistributedConfig(tp_plan="auto"))``."""
    return _parallel(build, folder, tp_plan="auto", tp_size=PROCESSES)


def expert_parallel(build: Make, folder: Path) -> tuple[Any, Any]:
    """The same with the experts spread over the processes."""
    return _parallel(build, folder, tp_size=PROCESSES, ep_size=PROCESSES, tp_plan="auto")


TOOLS = {tool.__name__: tool for tool in (fsdp, ddp, tensor_parallel, expert_parallel)}


def distance(found: Any, expected: Any) -> float:
    """Return the largest difference of two mappings of tensors; what only one has is infinitely far."""
    if found.keys() != expected.keys():
        return float("inf")
    return max(float((found[key] - expected[key]).abs().max()) for key in expected)


def outcomes(tools: list[str]) -> dict[str, dict[str, Any]]:
    """Return, for each tool and kind, the largest difference in any process, or what it was refused with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES),
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        command = [sys.executable, "-W", "ignore", __file__, folder, *tools]
        running = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for rank in range(PROCESSES)
        ]  # fmt: skip
        errors = [process.communicate(timeout=600)[1] for process in running]
        assert not any(process.returncode for process in running), errors[0][-3000:]
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    return {
        tool: {
            kind: max((each[tool][kind] for each in found), key=lambda cell: (str(cell) == cell, cell))
            for kind in KINDS
        }
        for tool in tools
    }


def main(folder: str, *tools: str) -> None:
    """Run every cell in this process, beside the other."""
    import transformers

    transformers.logging.set_verbosity_error()
    dist.init_process_group("gloo")
    found: dict[str, dict[str, Any]] = {}
    for tool in tools:
        for number, kind in enumerate(KINDS):
            try:
                place = Path(folder, f"{tool}-{number}")
                cell: Any = distance(*TOOLS[tool](partial(make, kind), place))
            except Exception as error:
                cell = f"{type(error).__name__}: {error}"
            found.setdefault(tool, {})[kind] = cell
            dist.barrier()
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
