"""Converting a checkpoint file by file: no model in memory, one tensor at a time.

Only the in-projections of converted FFNs are computed; every other tensor's bytes are copied from shard to shard.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_glu.checkpoint import check_destination, copy_other_files, first_line, load_skeleton, staged_folder
from hf_glu.conversion import plan
from hf_glu.conversion.entries import config_entries
from hf_glu.conversion.planning import Plan, Step
from hf_glu.conversion.report import Report, SiteReport
from hf_glu.errors import CheckpointError
from hf_glu.hub import resolve
from hf_glu.jsonio import write_json
from hf_glu.routes import Route

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Output:
    """One tensor to write: its dtype and shape, and what makes it."""

    dtype: str
    shape: list[int]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * DTYPES[self.dtype].itemsize


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
    target: str,
    *,
    layers: Any = None,
    exclude: str | None = None,
) -> Report:
    """Convert the safetensors checkpoint ``source`` into the new folder ``destination``, shard by shard.

    What comes out is what `hf_glu.convert_checkpoint` writes, with the shards of the source; memory holds one tensor at
    a time. Nothing is measured: `hf_glu.verify` compares the two.

    Raises:
        CheckpointError: a file that is missing, truncated or can't be written; weights that aren't safetensors.
        HfGluError: as `hf_glu.plan`.
    """
    folder = resolve(source)
    check_destination(destination)
    skeleton = load_skeleton(folder)
    planned = plan(skeleton, target, layers=layers, exclude=exclude)
    shards = _shards(folder)
    changes = _changes(skeleton, planned, {key for keys in shards.values() for key in keys})
    with staged_folder(destination) as stage:
        weight_map: dict[str, str] = {}
        total = 0
        for shard, keys in shards.items():
            sizes = _convert_shard(folder / shard, stage / shard, keys, changes)
            weight_map |= dict.fromkeys(sizes, shard)
            total += sum(sizes.values())
        if (folder / INDEX).is_file():
            write_json(stage / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for entry in config_entries(skeleton, planned):
            entry.write()
        skeleton.config.architectures = skeleton.config.architectures or [type(skeleton).__name__]
        skeleton.config.save_pretrained(stage)
        copy_other_files(folder, stage, keep=("generation_config.json",))
    sites = tuple(SiteReport(step=step, relative_error=None) for step in planned.steps)
    return Report(plan=planned, sites=sites, differences=None)


def _shards(folder: Path) -> dict[str, list[str]]:
    """Return the keys that each shard is to have."""
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{folder / INDEX} is no index of shards: {error}") from error
        shards: dict[str, list[str]] = {}
        for key, shard in weight_map.items():
            shards.setdefault(shard, []).append(key)
    elif (folder / SINGLE).is_file():
        shards = {SINGLE: []}
    else:
        raise CheckpointError(f"{folder} has no {SINGLE} and no {INDEX}: streaming reads safetensors only")
    for shard, keys in shards.items():
        with _opened(folder / shard) as file:
            have = set(file.keys())
        if missing := sorted(set(keys) - have):
            raise CheckpointError(f"{folder / shard} lacks {missing[0]}, which the index says it has")
        shards[shard] = keys or sorted(have)
    return shards


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"the shard {path} is missing")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {first_line(error)}") from error


def _changes(skeleton: Any, planned: Plan, keys: set[str]) -> dict[str, _Change]:
    """Return the checkpoint's keys of the in-projections that change; head and base models name them differently."""
    changes: dict[str, _Change] = {}
    prefix = f"{skeleton.base_model_prefix}."
    for step in planned.steps:
        if not step.changes or step.site.native:
            continue
        if step.route.name.startswith("mix"):
            raise CheckpointError("learnable activations can't be streamed: convert without streaming")
        path = f"{step.site.name}.{step.site.row.in_proj}"
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
        adds_bias=bool(step.route.up_bias) and not has_bias,
    )


def _convert_shard(source: Path, destination: Path, keys: list[str], changes: Mapping[str, _Change]) -> dict[str, int]:
    """Write one shard; return the size of each of its tensors in bytes."""
    try:
        with _opened(source) as file:
            outputs = {key: output for name in keys for key, output in _outputs(file, name, changes)}
            _write_safetensors(destination, outputs, file.metadata() or {"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(f"{source} can't be read: {first_line(error)}") from error
    return {key: output.size for key, output in outputs.items()}


def _outputs(file: Any, key: str, changes: Mapping[str, _Change]) -> Iterator[tuple[str, _Output]]:
    """Yield what becomes of one tensor of a shard."""
    module, _, kind = key.rpartition(".")
    found = file.get_slice(key)
    dtype, shape = found.get_dtype(), list(found.get_shape())
    if dtype not in DTYPES:
        raise CheckpointError(f"{key} has the dtype {dtype}: convert the unquantized checkpoint")
    change = changes.get(module) if kind in ("weight", "bias") else None
    if change is None:
        yield key, _Output(dtype=dtype, shape=shape, make=lambda: file.get_tensor(key))
        return
    bias, axis = kind == "bias", int(change.transposed and kind == "weight")
    wide = [extent * 2 if number == axis else extent for number, extent in enumerate(shape)]
    yield key, _Output(dtype=dtype, shape=wide, make=lambda: change.widen(file.get_tensor(key), bias=bias))
    if change.adds_bias and not bias:
        zeros = torch.zeros(shape[axis], dtype=DTYPES[dtype])
        yield f"{module}.bias", _Output(dtype=dtype, shape=[wide[axis]], make=lambda: change.widen(zeros, bias=True))


def _write_safetensors(path: Path, outputs: Mapping[str, _Output], metadata: dict[str, str]) -> None:
    """Write a safetensors file (https://github.com/huggingface/safetensors#format) a tensor at a time."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for key, output in outputs.items():
        header[key] = {"dtype": output.dtype, "shape": output.shape, "data_offsets": [offset, offset + output.size]}
        offset += output.size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for output in outputs.values():
            tensor = output.make().contiguous()
            if tensor.numel():
                file.write(tensor.flatten().view(torch.uint8).numpy().data)
