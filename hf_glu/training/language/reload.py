"""Comparing a language model with what a fresh process loads of it; and the program of that process.

usage: python -m hf_glu.training.language.reload FOLDER SCRATCH CLASS
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from hf_glu.checkpoint.jsonio import write_json
from hf_glu.checkpoint.writing import scratch_folder, writing
from hf_glu.errors import CheckpointError
from hf_glu.instruments.equality import align, checksums
from hf_glu.instruments.probe import evaluating
from hf_glu.training.loop.examples import Batch

BATCH_FILE, LOGITS_FILE, SUMS_FILE = "batch.safetensors", "logits.safetensors", "weights.json"


def same_when_loaded(model: Any, folder: Path, auto_class: str, batch: Batch) -> bool:
    """Return whether a new process loads the same weights from ``folder``, and gets the same logits, bit by bit.

    Raises:
        CheckpointError: the new process can't load it.
    """
    from safetensors.torch import load_file, save_file

    align(model)
    with scratch_folder() as scratch, writing(scratch):
        save_file({key: value.cpu().contiguous() for key, value in batch.items()}, scratch / BATCH_FILE)
        command = [sys.executable, "-m", __name__, str(folder), str(scratch), auto_class]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise CheckpointError(f"{folder} can't be loaded again: {why}")
        weights = json.loads((scratch / SUMS_FILE).read_text(encoding="utf-8"))
        there = load_file(scratch / LOGITS_FILE)["logits"]
    return bool(weights == checksums(model) and torch.equal(there, _logits(model.cpu(), batch)))


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """Return the logits of a batch; of a model without a head its last hidden states."""
    with evaluating(model):
        outputs = model(**{key: value.cpu() for key, value in batch.items()})
    found: torch.Tensor = outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state
    return found.float().contiguous()


def main(folder: str, scratch: str, auto_class: str) -> None:
    """Write checksums of the weights and the logits of a batch."""
    import transformers
    from safetensors.torch import load_file, save_file

    import hf_glu  # noqa: F401  (registers)

    model = getattr(transformers, auto_class).from_pretrained(folder)
    write_json(Path(scratch) / SUMS_FILE, checksums(model))
    align(model)
    logits = _logits(model, load_file(f"{scratch}/{BATCH_FILE}"))
    save_file({"logits": logits}, f"{scratch}/{LOGITS_FILE}")


if __name__ == "__main__":
    main(*sys.argv[1:])
