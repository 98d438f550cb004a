"""Tools that make a graph of a model, each called as its own documentation says, without hf_glu's own export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ecosystem import Make, answers, inputs
from torch import Tensor
from transformers.exporters.auto import EXPORT_BACKENDS, get_exporter_class
from transformers.exporters.base import ExportedModel

from hf_glu.compat.of_others import trusted
from hf_glu.publishing.export.graphs import FLOAT32

TRACED = (2, 12)


def exported(make: Make, folder: Path) -> tuple[Any, Any]:
    """``torch.export`` of the whole model, for any number of texts and tokens."""
    expected = answers(model := make())
    model.config.use_cache = False
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", min=2, max=64)
    shapes = {name: {0: batch, 1: length} for name in ("input_ids", "attention_mask")}
    program = torch.export.export(model, (), inputs(*TRACED), dynamic_shapes=shapes, strict=False)
    return answers(program.module()), expected


def jit_traced(make: Make, folder: Path) -> tuple[Any, Any]:
    """``torch.jit.trace``."""
    expected = answers(model := make())
    model.config.use_cache = False
    graph = torch.jit.trace(model, example_kwarg_inputs=inputs(*TRACED), strict=False, check_trace=False)
    return answers(graph), expected


def _by(backend: str, make: Make, folder: Path, **options: Any) -> tuple[Any, Any]:
    """Export by one of Transformers' exporters, load, and run."""
    expected = answers(model := make())
    config = EXPORT_BACKENDS[backend].config(dynamic=True, **options)
    get_exporter_class(backend)().export(model, {**inputs(*TRACED), "use_cache": False}, config).save_pretrained(folder)
    options = {"config": FLOAT32} if backend == "openvino" else {}
    loaded = ExportedModel.from_pretrained(folder, **trusted(ExportedModel.from_pretrained), **options)

    def call(**given: Tensor) -> Tensor:
        return torch.as_tensor(loaded(**given)["logits"])

    return answers(call), expected


def dynamo(make: Make, folder: Path) -> tuple[Any, Any]:
    """Transformers' DynamoExporter."""
    return _by("dynamo", make, folder)


def onnx(make: Make, folder: Path) -> tuple[Any, Any]:
    """Transformers' OnnxExporter."""
    return _by("onnx", make, folder)


def executorch(make: Make, folder: Path) -> tuple[Any, Any]:
    """Transformers' ExecutorchExporter."""
    return _by("executorch", make, folder)


def openvino(make: Make, folder: Path) -> tuple[Any, Any]:
    """Transformers' OpenVINOExporter."""
    return _by("openvino", make, folder)
