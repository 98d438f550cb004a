"""Converting a checkpoint file by file: no model in memory, one tensor at a time.

Only the in-projections of converted FFNs are computed; every other tensor's bytes are copied from shard to shard.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_glu.checkpoint.convert import check_destination, copy_other_files, load_model, staged_folder
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.checkpoint.provenance import REPORT_FILE, base_of
from hf_glu.checkpoint.shards import (
    INDEX,
    SINGLE,
    Output,
    Stored,
    read_header,
    read_parts,
    read_shards,
    read_tensor,
    write_shard,
)
from hf_glu.config.registry import GATED, registry
from hf_glu.conversion import plan
from hf_glu.conversion.checks import check_convertible
from hf_glu.conversion.config_entries import config_entries
from hf_glu.conversion.report import Report, SiteReport
from hf_glu.conversion.routes import Route
from hf_glu.conversion.steps import Plan, Step, Target
from hf_glu.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Shards = Mapping[str, Mapping[str, Stored]]


@dataclass(frozen=True, kw_only=True)
class _Change:
    """How the tensors of one in-projection change."""

    route: Route
    transposed: bool
    adds_bias: bool

    def widen(self, tensor: Tensor, *, bias: bool) -> Tensor:
        return self.route.widen(tensor, bias=bias, dim=int(self.transposed and not bias))


def convert_stream(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    target: Target,
    *,
    layers: Any = None,
    exclude: str | None = None,
    base_model: str | None = None,
) -> Report:
    """Convert the safetensors checkpoint ``source`` into the new folder ``destination``, shard by shard.

    What comes out is what `hf_glu.convert_checkpoint` writes, with the shards of the source; memory holds one tensor at
    a time. Transformers loads the source before and the result afterwards without weights, so that names, shapes and
    completeness are right. Nothing is measured: `hf_glu.verify` compares the two.

    Raises:
        CheckpointError: files that are missing, broken, of another model or can't be written; weights that aren't
            safetensors.
        HfGluError: as `hf_glu.plan`.
    """
    folder, base = resolve(source), base_of(source, base_model)
    check_destination(destination)
    shards = read_shards(folder)
    skeleton = _load_shapes(folder)
    check_convertible(skeleton)
    planned = plan(skeleton, target, layers=layers, exclude=exclude)
    changes = _changes(skeleton, planned, {key for keys in shards.values() for key in keys})
    with staged_folder(destination) as stage:
        _convert_shards(folder, stage, shards, changes)
        for entry in config_entries(skeleton, planned):
            entry.write()
        skeleton.config.architectures = skeleton.config.architectures or [type(skeleton).__name__]
        skeleton.config.save_pretrained(stage)
        copy_other_files(folder, stage, keep=("generation_config.json",))
        _load_shapes(stage)
        sites = tuple(SiteReport(step=step, relative_error=None) for step in planned.steps)
        report = Report(plan=planned, sites=sites, differences=None)
        write_json(stage / REPORT_FILE, {**report.to_dict(), "base": base})
    return report


def _load_shapes(folder: Path) -> Any:
    """Return the model of a checkpoint on the meta device, after loading it there: no weight is read.

    Raises:
        CheckpointError: the names and shapes of the weights aren't the model's, or some are missing.
    """
    model = load_model(folder, device_map="meta", use_safetensors=True)
    named = getattr(model.config, "transformers_weights", None)
    if named not in (None, SINGLE, INDEX):
        raise CheckpointError(f"the config of {folder} names {named} as the weights, which isn't streamed")
    return model


def _changes(skeleton: Any, planned: Plan, keys: set[str]) -> dict[str, _Change]:
    """Return the checkpoint's keys of the in-projections that change; head and base models name them differently."""
    changes: dict[str, _Change] = {}
    prefix = f"{skeleton.base_model_prefix}."
    for step in planned.steps:
        if step.changes and registry[step.target].flags != {GATED}:
            raise CheckpointError(f"{step.target} has parameters of its own, which aren't streamed: leave --stream out")
        if not step.changes or step.site.native:
            continue
        path = step.site.parts[-2]
        names = (path, path.removeprefix(prefix), prefix + path)
        found = next((name for name in names if f"{name}.weight" in keys), None)
        if found is None:
            raise CheckpointError(f"the checkpoint has no {path}.weight, nor under another prefix: can't be streamed")
        changes[found] = _change(step, has_bias=f"{found}.bias" in keys)
    return changes


def _change(step: Step, *, has_bias: bool) -> _Change:
    return _Change(
        route=step.route,
        transposed=isinstance(step.site.in_proj, Conv1D),
        adds_bias=step.adds_bias and not has_bias,
    )


def _convert_shards(folder: Path, stage: Path, shards: Shards, changes: Mapping[str, _Change]) -> None:
    """Write the converted shards and their index."""
    weight_map: dict[str, str] = {}
    total = 0
    for shard, tensors in shards.items():
        outputs = {
            name: output
            for key, stored in tensors.items()
            for name, output in _outputs(folder / shard, key, stored, changes)
        }
        try:
            write_shard(stage / shard, outputs)
        except (SafetensorError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"{folder / shard} can't be converted: {error}") from error
        written = {name: output.stored for name, output in outputs.items()}
        if read_header(stage / shard) != written:
            raise CheckpointError(f"{shard} can't be read back as it was written")
        weight_map |= dict.fromkeys(written, shard)
        total += sum(stored.size for stored in written.values())
    if list(shards) != [SINGLE]:
        write_json(stage / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _outputs(path: Path, key: str, stored: Stored, changes: Mapping[str, _Change]) -> Iterator[tuple[str, Output]]:
    """Yield what becomes of one tensor of a shard."""
    module, _, kind = key.rpartition(".")
    change = changes.get(module) if kind in ("weight", "bias") else None
    if change is None:
        yield key, Output(stored=stored, parts=partial(read_parts, path, key, stored))
        return
    if stored.dtype not in DTYPES:
        raise CheckpointError(f"{key} has the dtype {stored.dtype}: convert the unquantized checkpoint")
    bias, axis = kind == "bias", int(change.transposed and kind == "weight")
    wide = [extent * 2 if number == axis else extent for number, extent in enumerate(stored.shape)]
    yield (
        key,
        Output(
            stored=replace(stored, shape=wide, size=2 * stored.size),
            parts=lambda: iter([change.widen(read_tensor(path, key), bias=bias)]),
        ),
    )
    if change.adds_bias and not bias:
        zeros = torch.zeros(stored.shape[axis], dtype=DTYPES[stored.dtype])
        made = replace(stored, shape=[wide[axis]], size=wide[axis] * stored.itemsize)
        yield f"{module}.bias", Output(stored=made, parts=lambda: iter([change.widen(zeros, bias=True)]))
