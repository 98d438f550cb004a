"""A run's folder: checking it, saving the model in it, and comparing that with what a fresh process loads."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from hf_glu.checkpoint.files import CONFIG_FILE, RESULTS_FILE, RUN_FILE
from hf_glu.checkpoint.jsonio import read_object, write_json
from hf_glu.checkpoint.stopping import cleaned_up
from hf_glu.checkpoint.writing import is_free, partial_name, remove, scratch_folder, sync, writing
from hf_glu.errors import CheckpointError
from hf_glu.instruments.equality import align, checksums
from hf_glu.training.data.features import Features
from hf_glu.training.data.heads import auto_class
from hf_glu.training.data.prediction import Predictions, predict
from hf_glu.training.options import ModelOptions, TrainingOptions
from hf_glu.training.record import FREE_IF_RESUMED, check_same
from hf_glu.training.reload import DATA_FOLDER, LOGITS_FILE, ORDER_FILE, TEXTS_FILE, WEIGHTS_FILE
from hf_glu.training.results import Record, Results, RunEntry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RELOADED_ROWS = 1000


def run_entry(job: ModelOptions, options: TrainingOptions, made_of: Record, task: str) -> RunEntry:
    """Return the content of ``run.json`` before a run begins."""
    return {
        "model": job.title,
        "task": task,
        "activation": made_of["options"]["activation"],
        "options": {**job.to_dict(), **options.to_dict()},
        "versions": made_of["versions"],
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "made_of": made_of,
    }


def check_run_folder(folder: Path, entry: RunEntry, *, resume: bool) -> None:
    """Raise CheckpointError unless ``folder`` is new, or that of the same run, which ``resume`` goes on with."""
    with writing(folder):
        if is_free(folder):
            return
    known = folder / RUN_FILE
    if not known.is_file():
        raise CheckpointError(f"{folder} exists already and isn't an empty folder: choose another output")
    if not resume:
        finished = (folder / RESULTS_FILE).is_file()
        state = "a finished run:" if finished else "an unfinished run: --resume goes on with it, or"
        raise CheckpointError(f"{folder} has {state} choose another output")
    check_same(folder, entry["made_of"], FREE_IF_RESUMED, versions=False)


def known_results(folder: Path, made_of: Record) -> Results | None:
    """Read the results of the run in ``folder``; None if there is no run, or one that can be resumed.

    Raises:
        CheckpointError: it is made of something else.
    """
    if not (folder / RUN_FILE).is_file():
        return None
    if not (folder / RESULTS_FILE).is_file():
        check_same(folder, made_of, FREE_IF_RESUMED, versions=False)
        return None
    check_same(folder, made_of)
    return cast(Results, read_object(folder / RESULTS_FILE))


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer into ``folder``; ``config.json``, without which nothing loads, comes last."""
    stage = folder / partial_name()
    with writing(folder), cleaned_up():
        try:
            stage.mkdir()
            model.save_pretrained(stage)
            tokenizer.save_pretrained(stage)
            sync(stage)
            (folder / CONFIG_FILE).unlink(missing_ok=True)
            for path in sorted(stage.iterdir(), key=lambda path: path.name == CONFIG_FILE):
                target = folder / path.name
                if target.is_dir():
                    remove(target)
                os.replace(path, target)
        finally:
            remove(stage)


def reloads_equal(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, features: Features, batch_size: int
) -> bool:
    """Return whether a new process loads the same weights from ``folder``, and predicts the same, bit by bit.

    Raises:
        CheckpointError: the new process can't load it.
    """
    rows = range(min(RELOADED_ROWS, len(features.data)))
    some = replace(features, data=features.data.select(rows), owners=features.owners[: len(rows)])
    align(model)
    here = predict(model, some, tokenizer, batch_size=batch_size, title="here")
    there, weights = _fresh(folder, some, batch_size)
    return weights == checksums(model) and bool(there == here if features.text else np.array_equal(there, here))


def fresh_predictions(folder: Path, features: Features, batch_size: int) -> Predictions:
    """Compute the predictions of the model in ``folder`` in a new process.

    Raises:
        CheckpointError: the new process can't load it.
    """
    return _fresh(folder, features, batch_size)[0]


def _fresh(folder: Path, features: Features, batch_size: int) -> tuple[Predictions, dict[str, str]]:
    """Compute predictions, and checksums of weights, of the model in ``folder`` in a new process.

    Raises:
        CheckpointError: the new process can't load it.
    """
    with scratch_folder() as scratch, writing(scratch):
        features.data.save_to_disk(f"{scratch}/{DATA_FOLDER}")
        order = {
            "folder": str(folder),
            "auto_class": auto_class(features.task, text=features.text, joined=features.joined),
            "form": features.task.form,
            "text": features.text,
            "joined": features.joined,
            "side": features.side,
            "new_tokens": features.new_tokens,
            "batch_size": batch_size,
            "threads": torch.get_num_threads(),  # which sums are rounded in
        }
        write_json(scratch / ORDER_FILE, order)
        command = [sys.executable, "-m", "hf_glu.training.reload", str(scratch)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise CheckpointError(f"{folder} can't be loaded again: {why}")
        weights = json.loads((scratch / WEIGHTS_FILE).read_text(encoding="utf-8"))
        if features.text:
            return json.loads((scratch / TEXTS_FILE).read_text(encoding="utf-8")), weights
        return np.load(scratch / LOGITS_FILE), weights
