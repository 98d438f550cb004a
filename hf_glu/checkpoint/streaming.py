"""Converting a checkpoint file by file: no model in memory, one tensor at a time.

Only the in-projections of converted FFNs are computed; every other tensor's bytes are copied from shard to shard.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from hf_glu.checkpoint.folders import check_destination, copy_other_files, staged_folder
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.checkpoint.loading import load_model
from hf_glu.checkpoint.provenance import base_of, write_report
from hf_glu.checkpoint.shards import (
    FLOATS,
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
from hf_glu.conversion import Plan, plan
from hf_glu.conversion.report import Report, SiteReport
from hf_glu.conversion.steps import Change, Target
from hf_glu.conversion.work import TensorRule
from hf_glu.errors import CheckpointError

Shards = Mapping[str, Mapping[str, Stored]]


def convert_stream(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    target: Target | Change | None = None,
    *,
    base_model: str | None = None,
    **options: Any,
) -> Report:
    """Convert the safetensors checkpoint ``source`` into the new folder ``destination``, shard by shard.

    What comes out is what `hf_glu.convert_checkpoint` writes, with the shards of the source; memory holds one tensor at
    a time. Transformers loads the source before and the result afterwards without weights, so that names, shapes and
    completeness are right. Nothing is measured: `hf_glu.verify` compares the two.

    Args:
        source, destination: the checkpoints.
        target, options: as in `hf_glu.plan`; a change that takes more than one tensor at a time is refused.
        base_model: what the model card calls ``source``, where that is a folder.

    Raises:
        CheckpointError: files that are missing, broken, of another model or can't be written; weights that aren't
            safetensors.
        HfGluError: as `hf_glu.plan`.
    """
    folder, base = resolve(source), base_of(source, base_model)
    check_destination(destination)
    shards = read_shards(folder)
    skeleton = _load_shapes(folder)
    planned = plan(skeleton, target, **options)
    rules = _rules(skeleton, planned, {key for keys in shards.values() for key in keys})
    with staged_folder(destination) as stage:
        _convert_shards(folder, stage, shards, rules)
        for entry in planned.change.entries(skeleton, planned):
            entry.write()
        skeleton.config.architectures = skeleton.config.architectures or [type(skeleton).__name__]
        skeleton.config.save_pretrained(stage)
        copy_other_files(folder, stage)
        _load_shapes(stage)
        sites = tuple(SiteReport(step=step, relative_error=None) for step in planned.steps)
        report = Report(plan=planned, sites=sites, differences=None)
        write_report(stage, {**report.to_dict(), "base": base})
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


def _rules(skeleton: Any, planned: Plan, keys: Collection[str]) -> dict[str, TensorRule]:
    """Return the rules by the checkpoint's own paths; head and base models name them differently."""
    rules: dict[str, TensorRule] = {}
    prefix = f"{skeleton.base_model_prefix}."
    for step in planned.steps:
        found = step.change.tensors(step) if step.changes else []
        if found is None or planned.stages:
            raise CheckpointError(f"{step.change.name} takes a whole model and isn't streamed: leave --stream out")
        for rule in found:
            names = (rule.path, rule.path.removeprefix(prefix), prefix + rule.path)
            path = next((name for name in names if f"{name}.weight" in keys), None)
            if path is None:
                raise CheckpointError(
                    f"the checkpoint has no {rule.path}.weight, nor under another prefix: can't be streamed"
                )
            rules[path] = replace(rule, adds_bias=rule.adds_bias and f"{path}.bias" not in keys)
    return rules


def _convert_shards(folder: Path, stage: Path, shards: Shards, rules: Mapping[str, TensorRule]) -> None:
    """Write the converted shards and their index."""
    weight_map: dict[str, str] = {}
    total = 0
    for shard, tensors in shards.items():
        outputs = {
            name: output
            for key, stored in tensors.items()
            for name, output in _outputs(folder / shard, key, stored, rules)
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


def _outputs(path: Path, key: str, stored: Stored, rules: Mapping[str, TensorRule]) -> Iterator[tuple[str, Output]]:
    """Yield what becomes of one tensor of a shard."""
    module, _, kind = key.rpartition(".")
    rule = rules.get(module) if kind in ("weight", "bias") else None
    if rule is None:
        yield key, Output(stored=stored, parts=partial(read_parts, path, key, stored))
        return
    if stored.dtype not in FLOATS:
        raise CheckpointError(f"{key} has the dtype {stored.dtype}: convert the unquantized checkpoint")
    bias, axis = kind == "bias", int(rule.transposed and kind == "weight")
    wide = [extent * rule.times if number == axis else extent for number, extent in enumerate(stored.shape)]
    yield (
        key,
        Output(
            stored=replace(stored, shape=wide, size=rule.times * stored.size),
            parts=lambda: iter([rule.make(read_tensor(path, key), bias, axis)]),
        ),
    )
    if rule.adds_bias and not bias:
        zeros = torch.zeros(stored.shape[axis], dtype=FLOATS[stored.dtype])
        made = replace(stored, shape=[wide[axis]], size=wide[axis] * stored.itemsize)
        yield f"{module}.bias", Output(stored=made, parts=lambda: iter([rule.make(zeros, True, 0)]))
