"""Checkpoints for other runtimes: as graphs by Transformers' exporters, or folded into a stock architecture."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_glu.checkpoint.files import EXPORT_FILE
from hf_glu.checkpoint.folders import check_destination, copy_other_files, staged_folder
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.checkpoint.loading import load_model
from hf_glu.errors import ConversionError, OptionError, nearest
from hf_glu.publishing.export.folding import write_folded
from hf_glu.publishing.export.gguf import write_for_gguf
from hf_glu.publishing.export.graphs import RUNTIMES, check_packages, graph_outputs, load_graph, write_graph
from hf_glu.publishing.export.samples import distances, expected_outputs

__all__ = ["FORMATS", "TOLERANCE", "Exported", "export", "load_graph", "write_graph"]

TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote, and how far it is from the model.

    Attributes:
        format: of `FORMATS`.
        note: what it is.
        differences: max |a - b| / max(1, max |b|) of the outputs, by the shape of the inputs.
        tolerance: the most that they may be.
        files: bytes by name.
    """

    format: str
    note: str
    differences: dict[str, float]
    tolerance: float
    files: dict[str, int]

    @property
    def same(self) -> bool:
        """Whether nothing differs by more than the tolerance (NaN does)."""
        return all(difference <= self.tolerance for difference in self.differences.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return {**asdict(self), "same": self.same}


def export(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], *, format: str = "onnx",
    tolerance: float = TOLERANCE,
) -> Exported:  # fmt: skip
    """Write the checkpoint ``source`` (local folder or Hub id) into the new folder ``destination`` for another runtime.

    What was written is loaded and run by that runtime, and its outputs compared with the model's, on other numbers of
    sequences and tokens than a graph is traced with. Where anything goes wrong, ``destination`` isn't there.

    Args:
        source, destination: the folders.
        format: ``onnx``, ``program`` (torch.export), ``openvino`` and ``executorch`` are graphs in float32, of one
            forward pass without a cache; ``native`` is a checkpoint of a stock architecture, ``gguf`` one whose
            activation llama.cpp's converter reads right.
        tolerance: the most that an output may differ by, relative to the largest, if that is above 1.

    Raises:
        OptionError: an unknown format, a missing package, or a model that takes no token ids.
        CheckpointError: one of the folders can't be read or written.
        NoSiteError, ConversionError: the model can't be written so, or what was written computes something else.
    """
    if format not in FORMATS:
        raise OptionError(f"unknown format {format!r}; {nearest(format, FORMATS)}")
    folder = resolve(source)
    check_destination(destination)
    with staged_folder(destination) as stage:
        note, differences = FORMATS[format](folder, stage)
        copy_other_files(folder, stage)
        files = {path.name: path.stat().st_size for path in sorted(stage.iterdir()) if path.is_file()}
        result = Exported(format=format, note=note, differences=differences, tolerance=tolerance, files=files)
        if not result.same:
            raise ConversionError(
                f"the {format} of {source} computes something else: its outputs differ by "
                f"{max(differences.values()):.1e}, more than {tolerance:g}"
            )
        write_json(stage / EXPORT_FILE, result.to_dict())
    return result


def _graph(kind: str, source: Path, stage: Path) -> tuple[str, dict[str, float]]:
    check_packages(kind)
    model = load_model(source, dtype=torch.float32)
    write_graph(model, kind, stage)
    found = distances(expected_outputs(model), graph_outputs(model, stage))
    return f"{type(model).__name__} as a graph, {kind}, float32, one forward pass", found


def _native(source: Path, stage: Path) -> tuple[str, dict[str, float]]:
    note, before, after = write_folded(load_model(source), stage)
    return f"stock {note}", distances(before, after)


def _gguf(source: Path, stage: Path) -> tuple[str, dict[str, float]]:
    note, before, after = write_for_gguf(source, stage)
    return f"stock {note}, for llama.cpp's converter", distances(before, after)


# format -> writes a checkpoint into a folder; returns what it is and how far from the model
FORMATS: dict[str, Callable[[Path, Path], tuple[str, dict[str, float]]]] = {
    **{kind: partial(_graph, kind) for kind in RUNTIMES},
    "native": _native,
    "gguf": _gguf,
}
