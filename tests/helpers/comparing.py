"""How tests compare: whole tensors, one table of tolerances, and a fresh process where one is promised."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_glu.instruments.probe import probe_inputs, run

# what -> (relative, absolute)
TOLERANCE = {
    "bitwise": (0.0, 0.0),
    "exact": (1e-6, 1e-6),  # a GEMM of another shape adds in another order
    "exact up to rounding": (5e-6, 5e-6),  # an ulp in each FFN, through all layers
    "formula": (1e-12, 1e-12),  # float64 against a formula in float64
    "trained": (1e-3, 1e-5),  # Adam divides by the gradient's size: a few steps make more of a rounding
    "bf16": (2e-2, 2e-2),
    "gelu by sigmoid": (0.0, 0.0204),
}


def assert_same(actual: Any, expected: Any, tolerance: str) -> None:
    """Assert that two tensors, or two mappings of tensors, are the same within a row of the table."""
    relative, absolute = TOLERANCE[tolerance]
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys()
        assert expected, "nothing to compare"
        for key in expected:
            assert_same(actual[key], expected[key], tolerance)
        return
    assert isinstance(expected, Tensor)
    assert expected.numel()
    torch.testing.assert_close(actual, expected, rtol=relative, atol=absolute)


def outputs(model: Any, **inputs: Any) -> dict[str, Tensor]:
    """Return a model's outputs on the probe's inputs."""
    return run(model, inputs or probe_inputs(model))


_FRESH = """
import json
import sys
import torch
import hf_glu
import transformers
from hf_glu.instruments.probe import probe_inputs, run
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    with open(folder + "/config.json") as file:
        name = json.load(file)["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    bad = {key: sorted(map(str, value)) for key, value in info.items() if value}
    assert not bad, (folder, bad)
    torch.save(run(model.eval(), probe_inputs(model)), folder + ".outputs.pt")
"""


def fresh_process(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def fresh_outputs(saved: Mapping[str, Path]) -> dict[str, dict[str, Tensor]]:
    """Return the outputs of saved models (any name -> folder), all loaded by one new process.

    That process finds nothing missing, unexpected or mismatched.
    """
    done = fresh_process(_FRESH, *map(str, saved.values()))
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: torch.load(f"{folder}.outputs.pt", weights_only=True) for name, folder in saved.items()}
