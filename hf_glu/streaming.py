"""Converting a checkpoint file by file: no model in memory, one tensor at a time.

Only the in-projections of converted FFNs are computed; every other tensor's bytes are copied from shard to shard.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_glu.checkpoint import check_destination, copy_other_files, load_skeleton, staged_folder
from hf_glu.conversion import plan
from hf_glu.conversion.entries import config_entries
from hf_glu.conversion.report import Report, SiteReport
from hf_glu.conversion.steps import Plan, Step, Target
from hf_glu.errors import CheckpointError
from hf_glu.hub import resolve
from hf_glu.jsonio import write_json
from hf_glu.provenance import REPORT_FILE, base_of
from hf_glu.registry import GATED, registry
from hf_glu.routes import Route

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 2**24


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """One tensor in a shard: where its bytes are."""

    dtype: str
    shape: list[int]
    begin: int
    size: int

    def read(self, file: BinaryIO) -> Tensor:
        """Return the tensor."""
        file.seek(self.begin)
        data = bytearray(file.read(self.size))
        return torch.frombuffer(data, dtype=DTYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class _Output:
    """One tensor to write; ``make`` writes its bytes."""

    dtype: str
    shape: list[int]
    size: int
    make: Callable[[BinaryIO, BinaryIO], None]


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
    a time. Nothing is measured: `hf_glu.verify` compares the two.

    Raises:
        CheckpointError: a file that is missing, truncated or can't be written; weights that aren't safetensors.
        HfGluError: as `hf_glu.plan`.
    """
    folder, base = resolve(source), base_of(source, base_model)
    check_destination(destination)
    skeleton = load_skeleton(folder)
    planned = plan(skeleton, target, layers=layers, exclude=exclude)
    shards = _shards(folder)
    changes = _changes(skeleton, planned, {key for keys in shards.values() for key in keys})
    with staged_folder(destination) as stage:
        weight_map: dict[str, str] = {}
        total = 0
        for shard, tensors in shards.items():
            sizes = _convert_shard(folder / shard, stage / shard, tensors, changes)
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
        report = Report(plan=planned, sites=sites, differences=None)
        write_json(stage / REPORT_FILE, {**report.to_dict(), "base": base})
    return report


def _shards(folder: Path) -> dict[str, dict[str, _Stored]]:
    """Return the tensors that each shard has."""
    if (folder / INDEX).is_file():
        try:
            weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{folder / INDEX} is no index of shards: {error}") from error
        shards = {shard: _read_header(folder / shard) for shard in dict.fromkeys(weight_map.values())}
        for key, shard in weight_map.items():
            if key not in shards[shard]:
                raise CheckpointError(f"{folder / shard} lacks {key}, which the index says it has")
        return shards
    if (folder / SINGLE).is_file():
        return {SINGLE: _read_header(folder / SINGLE)}
    raise CheckpointError(f"{folder} has no {SINGLE} and no {INDEX}: streaming reads safetensors only")


def _read_header(path: Path) -> dict[str, _Stored]:
    """Return the tensors of a safetensors file (https://github.com/huggingface/safetensors#format)."""
    if not path.is_file():
        raise CheckpointError(f"the shard {path} is missing")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length) if length < size else b"")
        stored = {
            key: _Stored(dtype=entry["dtype"], shape=entry["shape"], begin=8 + length + begin, size=end - begin)
            for key, entry in header.items()
            if key != "__metadata__"
            for begin, end in [entry["data_offsets"]]
        }
    except (struct.error, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file") from error
    if any(tensor.begin + tensor.size > size for tensor in stored.values()):
        raise CheckpointError(f"{path} is truncated: it has {size} bytes, its header says more")
    return stored


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


def _convert_shard(
    source: Path, destination: Path, tensors: Mapping[str, _Stored], changes: Mapping[str, _Change]
) -> dict[str, int]:
    """Write one shard; return the size of each of its tensors in bytes."""
    outputs = {key: output for name, stored in tensors.items() for key, output in _outputs(name, stored, changes)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, output in outputs.items():
        header[key] = {"dtype": output.dtype, "shape": output.shape, "data_offsets": [offset, offset + output.size]}
        offset += output.size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with source.open("rb") as file, destination.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for output in outputs.values():
            output.make(file, out)
    return {key: output.size for key, output in outputs.items()}


def _outputs(key: str, stored: _Stored, changes: Mapping[str, _Change]) -> Iterator[tuple[str, _Output]]:
    """Yield what becomes of one tensor of a shard."""
    module, _, kind = key.rpartition(".")
    change = changes.get(module) if kind in ("weight", "bias") else None
    if change is None:
        yield key, _Output(dtype=stored.dtype, shape=stored.shape, size=stored.size, make=partial(_copy, stored))
        return
    if stored.dtype not in DTYPES:
        raise CheckpointError(f"{key} has the dtype {stored.dtype}: convert the unquantized checkpoint")
    bias, axis = kind == "bias", int(change.transposed and kind == "weight")
    wide = [extent * 2 if number == axis else extent for number, extent in enumerate(stored.shape)]
    make = partial(_widen, stored, change, bias=bias)
    yield key, _Output(dtype=stored.dtype, shape=wide, size=2 * stored.size, make=make)
    if change.adds_bias and not bias:
        extra = _Stored(dtype=stored.dtype, shape=[stored.shape[axis]], begin=0, size=0)
        size = wide[axis] * DTYPES[stored.dtype].itemsize
        make = partial(_widen, extra, change, bias=True)
        yield f"{module}.bias", _Output(dtype=stored.dtype, shape=[wide[axis]], size=size, make=make)


def _copy(stored: _Stored, file: BinaryIO, out: BinaryIO) -> None:
    file.seek(stored.begin)
    left = stored.size
    while left:
        part = file.read(min(left, CHUNK))
        if not part:
            raise CheckpointError(f"{file.name} ended while it was read")
        out.write(part)
        left -= len(part)


def _widen(stored: _Stored, change: _Change, file: BinaryIO, out: BinaryIO, *, bias: bool) -> None:
    """Write ``[gate | up]``; a tensor without bytes of its own is the zero bias that a bias-free family gets."""
    dense = stored.read(file) if stored.size else torch.zeros(stored.shape, dtype=DTYPES[stored.dtype])
    wide = change.widen(dense, bias=bias).contiguous()
    out.write(wide.flatten().view(torch.uint8).numpy().data)
