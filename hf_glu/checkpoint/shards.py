"""Reading and writing a checkpoint's safetensors files, tensor by tensor."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_glu.checkpoint.files import WEIGHTS_FILE as SINGLE
from hf_glu.checkpoint.files import WEIGHTS_INDEX_FILE as INDEX
from hf_glu.errors import CheckpointError

CHUNK = 2**24
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# a plain name, so that what is read and written under it lies in the checkpoint's folder, on every system
_NAME = re.compile(r"[A-Za-z0-9_][\w.+-]*\.safetensors", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file: its dtype as the format calls it, its shape, its bytes, and the bytes of each number."""

    dtype: str
    shape: list[int]
    size: int
    itemsize: int


@dataclass(frozen=True, kw_only=True)
class Output:
    """A tensor to write: its description, and a function that yields it in parts."""

    stored: Stored
    parts: Callable[[], Iterator[Tensor]]


def read_shards(folder: Path) -> dict[str, dict[str, Stored]]:
    """Return a checkpoint's safetensors files, each with the descriptions of its tensors.

    Raises:
        CheckpointError: there are none, it isn't clear which, or they don't hold what their index says.
    """
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise CheckpointError(f"{folder} has no {SINGLE} and no {INDEX}: streaming reads safetensors only")
        return {SINGLE: read_header(folder / SINGLE)}
    named = _read_index(folder / INDEX)
    names = dict.fromkeys(named.values())
    if (folder / SINGLE).is_file() and list(names) != [SINGLE]:
        raise CheckpointError(f"{folder} has both {SINGLE} and {INDEX}: remove the one that isn't meant")
    shards = {name: read_header(folder / name) for name in names}
    for key, name in named.items():
        if key not in shards[name]:
            raise CheckpointError(f"{folder / name} lacks {key}, which the index says it has")
    for key, count in Counter(chain.from_iterable(shards.values())).items():
        if key not in named or count > 1:
            what = f"{key} is in {count} shards" if key in named else f"the index lacks {key}, which a shard has"
            raise CheckpointError(f"{folder}: {what}")
    return shards


def _read_index(path: Path) -> dict[str, str]:
    """Read an index of shards: tensor name -> file name."""
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no index of shards: {error!r}") from error
    if not isinstance(named, dict) or not named:
        raise CheckpointError(f"{path} is no index of shards: its weight_map must name the file of each tensor")
    for name in named.values():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise CheckpointError(
                f"{path} names {name!r}: a shard's name is one such as model-00001-of-00002.safetensors"
            )
    return named


def read_header(path: Path) -> dict[str, Stored]:
    """Return the descriptions of a safetensors file's tensors, after the library has checked offsets and shapes.

    Raises:
        CheckpointError: there is no such file, or it isn't whole.
    """
    if not path.is_file():
        raise CheckpointError(f"the shard {path} is missing")
    try:
        with safe_open(path, "pt") as file:
            return {key: _stored(file, key) for key in file.keys()}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from error


def _stored(file: safe_open, key: str) -> Stored:
    entry, tensor = file.get_slice(key), file.get_tensor(key)  # maps the file, and reads nothing of it
    return Stored(dtype=entry.get_dtype(), shape=entry.get_shape(), size=tensor.nbytes, itemsize=tensor.element_size())


def read_parts(path: Path, key: str, stored: Stored) -> Iterator[Tensor]:
    """Yield a tensor of a file in blocks of rows of about `CHUNK` bytes.

    The file is opened for each part, since what was read of it stays in memory until it is closed.
    """
    if not stored.shape or not stored.size:
        yield read_tensor(path, key)
        return
    rows = max(1, CHUNK * stored.shape[0] // stored.size)
    for start in range(0, stored.shape[0], rows):
        with safe_open(path, "pt") as file:
            yield file.get_slice(key)[start : start + rows]


def read_tensor(path: Path, key: str) -> Tensor:
    """Read one tensor of a file."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(key)


def write_shard(path: Path, outputs: Mapping[str, Output]) -> None:
    """Write a safetensors file (https://github.com/huggingface/safetensors#format), one part of a tensor at a time.

    Wide numbers come first, as in the library's own files, so that each tensor begins at a multiple of its numbers'
    size.
    """
    ordered = sorted(outputs, key=lambda key: (-outputs[key].stored.itemsize, key))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in ordered:
        stored = outputs[key].stored
        header[key] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [offset, offset + stored.size]}
        offset += stored.size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for key in ordered:
            for part in outputs[key].parts():
                out.write(part.contiguous().flatten().view(torch.uint8).numpy().data)
