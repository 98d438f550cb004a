"""Saved models that wait for one fresh process, which loads all of them: a process each would take seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .running import Tally

_FRESH = """
import sys, torch, hf_glu, transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    try:
        known = torch.load(folder + "/known.pt", weights_only=True)
        model, info = getattr(transformers, known["class"]).from_pretrained(folder, output_loading_info=True)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
            found = model.eval()(**known["inputs"])
        bad = [str(key) for key, value in info.items() if value]
        pairs = {key: (found[key], value) for key, value in known["outputs"].items()}
        bad += [key for key, pair in pairs.items() if not torch.equal(*(each.nan_to_num() for each in pair))]
        print("differs in", bad) if bad else print("same")
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " ")[:300])
"""


class Shelf:
    """Saved models; one of ``every`` is put here."""

    def __init__(self, every: int = 8) -> None:
        self.every, self.seen, self.waiting = every, 0, {}

    def __contains__(self, folder: Path) -> bool:
        return folder in self.waiting

    def wants(self) -> bool:
        """Tell whether the next model is to be put here."""
        self.seen += 1
        return self.seen % self.every == 0

    def put(self, folder: Path, name: str, inputs: Any, outputs: dict[str, Tensor], said: str) -> None:
        """Keep a saved model with what it computes."""
        torch.save({"class": name, "inputs": inputs, "outputs": outputs}, folder / "known.pt")
        self.waiting[folder] = said

    def finish(self) -> Tally:
        """Load all in one fresh process, compare, and clear."""
        tally, folders = Tally(), list(self.waiting)
        for start in range(0, len(folders), 100):
            part = folders[start : start + 100]
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", _FRESH, *map(str, part)],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
            lines = [*done.stdout.splitlines(), *[done.stderr[-300:]] * len(part)][: len(part)]
            for folder, line in zip(part, lines, strict=True):
                tally.expect(line == "same", f"in a fresh process: {line}\n    {self.waiting[folder]}")
        for folder in folders:
            shutil.rmtree(folder)
        self.waiting.clear()
        return tally
