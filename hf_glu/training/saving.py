"""A run's folder: what is written at its start and at its end, and the saved model checked in a fresh process."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_glu.equality import align, checksums
from hf_glu.errors import CheckpointError
from hf_glu.jsonio import to_json, write_json
from hf_glu.training.features import Features
from hf_glu.training.options import JobOptions, TrainingOptions
from hf_glu.training.prediction import predict

RUN, RESULTS = "run.json", "results.json"
RELOADED_ROWS = 1000
PACKAGES = ("hf_glu", "transformers", "torch", "accelerate", "datasets", "peft")
# what a resumed run may have otherwise
FREE = ("output", "checkpoint_every", "log_every", "eval_batch_size", "tracker", "mixed_precision", "predict")


def run_entry(job: JobOptions, options: TrainingOptions) -> dict[str, Any]:
    """Return what ``run.json`` says of a run before it begins."""
    return {
        "model": job.title,
        "task": job.task or (f"mixture of {job.mixture}" if job.mixture else Path(str(job.dataset)).stem),
        "activation": job.to,
        "options": {**job.to_dict(), **options.to_dict()},
        "versions": {name: version(name) for name in PACKAGES},
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
    }


def check_run_folder(folder: Path, entry: dict[str, Any], *, resume: bool) -> None:
    """Raise CheckpointError unless a run may write to ``folder``: a new one, or its own with ``resume``."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    known = folder / RUN
    if not known.is_file():
        raise CheckpointError(f"{folder} exists already and isn't an empty folder: choose another output")
    if (folder / RESULTS).is_file():
        raise CheckpointError(f"{folder} has a finished run: choose another output")
    if not resume:
        raise CheckpointError(f"{folder} has an unfinished run: --resume goes on with it, or choose another output")
    before = json.loads(known.read_text(encoding="utf-8"))["options"]
    now = json.loads(to_json(entry["options"]))
    for key in now:
        if key not in FREE and before.get(key) != now[key]:
            raise CheckpointError(
                f"{folder} has a run with {key}={before.get(key)!r}, not {now[key]!r}: it can't be resumed as such"
            )


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer into ``folder``; ``config.json``, without which nothing loads, comes last."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".model-") as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        for path in sorted(Path(stage).iterdir(), key=lambda path: path.name == "config.json"):
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.rename(target)


def reloads_equal(model: Any, tokenizer: Any, folder: Path, features: Features, batch_size: int) -> bool:
    """Tell whether the model in ``folder``, loaded in a new process, has and predicts bitwise the same.

    Raises:
        CheckpointError: the new process can't load it.
    """
    rows = range(min(RELOADED_ROWS, len(features.data)))
    some = Features(
        task=features.task, raw=features.raw, data=features.data.select(rows), owners=features.owners[: len(rows)],
        text=features.text,
    )  # fmt: skip
    align(model)
    here = predict(model, some, tokenizer, batch_size=batch_size, title="here")
    there, weights = _fresh(folder, some, batch_size)
    return weights == checksums(model) and bool(there == here if features.text else np.array_equal(there, here))


def fresh_predictions(folder: Path, features: Features, batch_size: int) -> Any:
    """Return the predictions of the model in ``folder``, computed in a new process.

    Raises:
        CheckpointError: the new process can't load it.
    """
    return _fresh(folder, features, batch_size)[0]


def _fresh(folder: Path, features: Features, batch_size: int) -> tuple[Any, dict[str, str]]:
    """Return the predictions of the model in ``folder`` and its weights' checksums, from a new process.

    Raises:
        CheckpointError: the new process can't load it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        features.data.save_to_disk(f"{scratch}/data")
        order = {"folder": str(folder), "task": features.task.name, "text": features.text, "batch_size": batch_size}
        write_json(Path(scratch) / "order.json", order)
        command = [sys.executable, "-m", "hf_glu.training.reload", scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckpointError(f"{folder} can't be loaded again: {done.stderr.strip().splitlines()[-1]}")
        weights = json.loads(Path(scratch, "weights.json").read_text(encoding="utf-8"))
        if features.text:
            return json.loads(Path(scratch, "texts.json").read_text(encoding="utf-8")), weights
        return np.load(f"{scratch}/logits.npy"), weights
