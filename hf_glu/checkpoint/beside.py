"""What a conversion leaves as it is in a checkpoint's files: tensors without a place in its model, and their precision.

A checkpoint may hold more than the class that its config names (BERT's pooler beside a masked language model), and
numbers of several dtypes. A model in memory has neither; what is written from it is completed from the source here.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_glu.checkpoint.files import WEIGHTS_FILE, WEIGHTS_INDEX_FILE
from hf_glu.checkpoint.gguf import is_gguf
from hf_glu.checkpoint.jsonio import read_object, write_json
from hf_glu.checkpoint.shards import FLOATS, Output, Stored, read_header, read_parts, read_tensor, write_shard
from hf_glu.checkpoint.writing import PARTIAL, partial_name
from hf_glu.compat.of_models import IGNORE_UNEXPECTED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PICKLES = "pytorch_model*.bin"
_OLD_NAMES = {"weight": "gamma", "bias": "beta"}  # which old files have, and Transformers reads
Files = Mapping[str, tuple[Path, Stored]]


def main_dtype(folder: Path) -> torch.dtype | str:
    """Return the dtype of most of a checkpoint's numbers, whatever its config says; ``auto`` where no header has it."""
    counts: Counter[str] = Counter()
    for _, stored in _files(_safetensors(folder)).values():
        counts[stored.dtype] += stored.size // stored.itemsize
    known = [dtype for dtype, _ in counts.most_common() if dtype in FLOATS]
    return FLOATS[known[0]] if known else "auto"


def keep_beside(source: Path, stage: Path, model_class: type[PreTrainedModel]) -> None:
    """Complete what a model was saved as in ``stage`` by what ``source``, which it was loaded from, has beside it.

    Tensors without a place in ``model_class`` come along under their names. A tensor whose dtype is another than in the
    source (of safetensors), and its value but for that the same, is written as it is there.

    Args:
        source: a folder, or a GGUF file, which has nothing beside its model.
        stage: a folder with safetensors files.
        model_class: of the model.
    """
    if is_gguf(source):
        return
    files = _files(_safetensors(source))
    pickled = {} if files else _pickled(source)
    names = list(_left_out(source, model_class, files.keys() | pickled.keys()))
    with tempfile.TemporaryDirectory(dir=stage, prefix=PARTIAL) as scratch:
        if pickled and names:
            unpickled = Path(scratch) / WEIGHTS_FILE
            save_file({key: pickled[key].clone() for key in names}, unpickled)  # tied ones share memory
            files = _files([unpickled])
        left = {key: files[key] for key in names}
        written = _safetensors(stage)
        for path in written:
            now = read_header(path)
            kept = {key: _kept(key, (path, stored), files) for key, stored in now.items()}
            kept |= {key: place for key, place in left.items() if path == written[-1] and key not in now}
            if {key: stored for key, (_, stored) in kept.items()} != now:
                _rewrite(path, kept)
                _index(stage, path.name, kept.keys())


def _safetensors(folder: Path) -> list[Path]:
    """Return the safetensors files that Transformers reads."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not (folder / WEIGHTS_INDEX_FILE).is_file():
        return []
    named: Any = read_object(folder / WEIGHTS_INDEX_FILE).get("weight_map", {})
    return [folder / name for name in sorted(set(named.values()))]


def _files(paths: Iterable[Path]) -> dict[str, tuple[Path, Stored]]:
    """Return the tensors of safetensors files, each with its file."""
    return {key: (path, stored) for path in paths for key, stored in read_header(path).items()}


def _pickled(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint that isn't stored as safetensors; what isn't read stays on the disk."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob(_PICKLES)):
        entries = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))  # old ones aren't
        found |= {key: entry for key, entry in entries.items() if isinstance(entry, Tensor)}
    return found


def _left_out(source: Path, model_class: type[PreTrainedModel], names: Collection[str]) -> Iterator[str]:
    """Yield the names of the tensors without a place in a model; warn of those that can't be found under their own."""
    strict: Any = type(model_class.__name__, (model_class,), {IGNORE_UNEXPECTED.name: None})
    options: Any = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    lost = []
    for name in sorted(strict.from_pretrained(source, **options)[1]["unexpected_keys"]):
        stem, _, kind = name.rpartition(".")
        known = [each for each in (name, f"{stem}.{_OLD_NAMES.get(kind)}") if each in names]
        lost += [] if known else [name]
        yield from known
    if lost:
        warnings.warn(
            f"{source} has {lost[0]}, which {model_class.__name__} has no place for and which isn't stored under that "
            "name: it stays behind; --stream keeps it",
            stacklevel=4,
        )


def _kept(key: str, now: tuple[Path, Stored], files: Files) -> tuple[Path, Stored]:
    """Return where a tensor is to be written from: the source, where it was the same in a dtype of its own."""
    before = files.get(key, now)
    if before[1].dtype == now[1].dtype or before[1].shape != now[1].shape:
        return now
    tensor = read_tensor(now[0], key)
    return before if torch.equal(read_tensor(before[0], key).to(tensor.dtype), tensor) else now


def _rewrite(path: Path, places: Files) -> None:
    """Write a file anew, of tensors of it and of others."""
    anew = path.with_name(partial_name())
    parts = {key: partial(read_parts, file, key, stored) for key, (file, stored) in places.items()}
    write_shard(anew, {key: Output(stored=places[key][1], parts=parts[key]) for key in places})
    os.replace(anew, path)


def _index(folder: Path, name: str, keys: Iterable[str]) -> None:
    """Write into the index of shards, where there is one, what a file has now."""
    path = folder / WEIGHTS_INDEX_FILE
    if not path.is_file():
        return
    index: Any = read_object(path)
    index["weight_map"] |= dict.fromkeys(keys, name)
    sizes = (stored.size for _, stored in _files(_safetensors(folder)).values())
    index["metadata"] = {**index.get("metadata", {}), "total_size": sum(sizes)}
    write_json(path, index)
