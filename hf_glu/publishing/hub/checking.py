"""Checking that a folder, loaded in a fresh process, computes the same as the model that it was written from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from hf_glu.checkpoint.jsonio import write_json
from hf_glu.checkpoint.writing import scratch_folder
from hf_glu.compat.of_models import ATTENTION, MODEL_MAPPING
from hf_glu.errors import CheckpointError, OptionError
from hf_glu.instruments.equality import align, checksums, same_bits
from hf_glu.instruments.probe import probe_inputs, run
from hf_glu.publishing.hub.fresh import INPUTS_FILE, ORDER_FILE, OUTPUTS_FILE, WEIGHTS_FILE
from hf_glu.publishing.hub.staging import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLUGIN, CODE = "plugin", "remote code"


Expected = TypedDict(
    "Expected",
    {
        "inputs": dict[str, Tensor],
        "outputs": dict[str, Tensor],
        "weights": dict[str, str],
        "class": str,
        "device": str,
        "options": dict[str, str],
    },
)


def expected_outputs(model: PreTrainedModel) -> Expected:
    """Run ``model`` on probe inputs; return these, its outputs and its weights' checksums for a fresh process to match.

    Raises:
        CheckpointError: it doesn't take token ids.
    """
    try:
        inputs = probe_inputs(model)
    except OptionError:
        raise CheckpointError(
            f"{type(model).__name__} doesn't take token ids, so that nothing can be compared: push it with check=False "
            "(--no-check)"
        ) from None
    align(model)
    return {
        "inputs": inputs,
        "outputs": run(model, inputs),
        "weights": checksums(model),
        "class": type(model).__name__,
        "device": str(next(model.parameters()).device),
        "options": {"attn_implementation": ATTENTION.of(model.config)},
    }


def check_loads(folder: Path, expected: Expected, *, code: bool) -> tuple[str, ...]:
    """Load ``folder`` in fresh processes, compare weights and outputs bitwise, and return how it was loaded.

    Args:
        folder: a checkpoint.
        expected: what `expected_outputs` gives for the model.
        code: whether it has code beside it, which loads it where hf_glu isn't installed.

    Raises:
        CheckpointError: it doesn't load, or computes something else.
    """
    ways = {PLUGIN: "", **({CODE: _auto_class(folder, expected["class"])} if code else {})}
    for way, auto_class in ways.items():
        found, weights = _fresh(folder, expected, way, auto_class)
        if changed := sorted(key for key, value in expected["weights"].items() if weights.get(key) != value):
            raise CheckpointError(
                f"loaded in a fresh process ({way}), the model has other weights, such as {changed[0]}: it isn't pushed"
            )
        outputs = {key: value.cpu() for key, value in expected["outputs"].items()}
        different = [key for key in outputs if key not in found or not same_bits(outputs[key], found[key])]
        if different or found.keys() != outputs.keys():
            raise CheckpointError(
                f"loaded in a fresh process ({way}), the model gives other {', '.join(different) or 'outputs'}: "
                "it isn't pushed"
            )
    return tuple(ways)


def _auto_class(folder: Path, name: str) -> str:
    """Return an Auto class that loads the model class ``name`` by the code in ``folder``."""
    import transformers

    auto_map = read_config(folder).get("auto_map", {})
    config_class = type(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False))
    for auto in auto_map:
        served = MODEL_MAPPING.of(getattr(transformers, auto, None), {}).get(config_class, ())
        if name in [made.__name__ for made in (served if isinstance(served, (tuple, list)) else (served,))]:
            return str(auto)
    raise CheckpointError(f"no Auto class loads {name} by the code beside it: push it with code=False (--no-code)")


def _fresh(folder: Path, expected: Expected, way: str, auto_class: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load ``folder`` in a fresh process; return its outputs and the checksums of its weights."""
    from safetensors.torch import load_file, save_file

    with scratch_folder() as scratch:
        order = {"folder": str(folder), "auto_class": auto_class, "threads": torch.get_num_threads()}
        write_json(scratch / ORDER_FILE, {**order, "device": expected["device"], "options": expected["options"]})
        save_file({key: value.cpu() for key, value in expected["inputs"].items()}, scratch / INPUTS_FILE)
        script = (files("hf_glu.publishing.hub") / "fresh.py").read_text(encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", script, str(scratch)],
            env=_environment(scratch),
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            why = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
            raise CheckpointError(f"the model doesn't load in a fresh process ({way}), so that it isn't pushed: {why}")
        weights = json.loads((scratch / WEIGHTS_FILE).read_text(encoding="utf-8"))
        return load_file(scratch / OUTPUTS_FILE), weights


def _environment(scratch: Path) -> dict[str, str]:
    """Return the environment of a fresh process: without network, and with an empty cache of code."""
    package_root = str(Path(__file__).resolve().parents[3])
    paths = [os.environ.get("PYTHONPATH", ""), package_root]
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": f"{scratch}/modules",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
