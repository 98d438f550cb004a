"""Ways to make a model small for a CPU: smaller number formats, and ONNX Runtime.

int8 here is that of linear layers: weights are rounded once, inputs as they come. GPT-2's layers are of another class
(Conv1D), which torch and torchao leave alone, and ONNX Runtime doesn't.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_glu.compat.of_others import QUANTIZER, QUANTIZER_CONFIG
from hf_glu.publishing.export import load_graph, write_graph

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EAGER = "float32"


class Graph(nn.Module):
    """A module that runs a graph by ONNX Runtime.

    Args:
        folder: where the graph is.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.graph = load_graph(folder)
        self.device = nn.Parameter(torch.empty(0))  # where inputs belong, for those who ask a model's parameters

    def forward(self, *, input_ids: Tensor, **inputs: Tensor) -> Any:
        """Run the graph; it insists on token types, which are 0 if none are given."""
        given = {"token_type_ids": torch.zeros_like(input_ids), "input_ids": input_ids, **inputs}
        wanted = self.graph.components["model"].metadata.kwargs
        return self.graph(**{name: value for name, value in given.items() if name in wanted})


@dataclass(frozen=True)
class Made:
    """A model made small, with its size.

    Attributes:
        model: takes ids and mask, as the original does.
        size: bytes on disk.
    """

    model: nn.Module
    size: int


def eager(model: PreTrainedModel, folder: Path) -> Made:
    """Return the model as it is."""
    return _saved(model)


def bfloat16(model: PreTrainedModel, folder: Path) -> Made:
    """Make a copy with weights and arithmetic in bfloat16."""
    return _saved(copy.deepcopy(model).to(torch.bfloat16))


def torchao(model: PreTrainedModel, folder: Path) -> Made:
    """Make a copy with torchao's int8 weights and inputs."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    made = copy.deepcopy(model)
    quantize_(made, Int8DynamicActivationInt8WeightConfig())
    return _saved(made)


def torch_dynamic(model: PreTrainedModel, folder: Path) -> Made:
    """Make a copy with torch's own int8 weights and inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torchao is to follow it
        return _saved(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8))


def onnx(model: PreTrainedModel, folder: Path) -> Made:
    """Export the model as a graph."""
    return _graph(model, folder)


def onnx_int8(model: PreTrainedModel, folder: Path) -> Made:
    """Export the model as a graph with int8 weights and inputs."""
    return _graph(model, folder, quantizer=QUANTIZER.find()(QUANTIZER_CONFIG.find()()))


def _graph(model: PreTrainedModel, folder: Path, **options: Any) -> Made:
    write_graph(model, "onnx", folder, **options)
    return Made(Graph(folder), sum(path.stat().st_size for path in folder.glob("model.onnx*")))


def _saved(model: nn.Module) -> Made:
    written = io.BytesIO()
    torch.save(model.state_dict(), written)
    return Made(model, len(written.getbuffer()))


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to make a model small, and what it needs.

    Attributes:
        make: makes it, in a folder of its own where it needs one.
        packages: what that needs.
        pruned: whether the pruned model is made small so, too.
    """

    make: Callable[[PreTrainedModel, Path], Made]
    packages: tuple[str, ...] = ()
    pruned: bool = False


_ONNX = ("onnx", "onnxscript", "onnxruntime")
WAYS = {
    EAGER: Way(make=eager, pruned=True),
    "bfloat16": Way(make=bfloat16),
    "int8, torchao": Way(make=torchao, packages=("torchao",)),
    "int8, torch": Way(make=torch_dynamic, pruned=True),
    "float32, ONNX Runtime": Way(make=onnx, packages=_ONNX),
    "int8, ONNX Runtime": Way(make=onnx_int8, packages=_ONNX, pruned=True),
}
