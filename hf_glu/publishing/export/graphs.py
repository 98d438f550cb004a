"""ONNX and programs of torch.export, by Transformers' own exporters, for any batch size and number of tokens.

A graph is one forward pass without a cache: token ids in, logits or hidden states out. Padding is masked as in the
model; a number of tokens beyond the model's positions, or 4,096 where it has no such number, is beyond the graph, too.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_glu.activation.kernels.scan.traced import LONGEST, at_most
from hf_glu.checkpoint.config_file import first_line
from hf_glu.compat.of_others import EXPORT_BACKENDS, EXPORTED, EXPORTER_CLASS, trusted
from hf_glu.compat.of_torch import IS_EXPORTING
from hf_glu.config.extras import need
from hf_glu.config.traits import longest_text
from hf_glu.conversion.checks import check_convertible
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.sites import find_mixers
from hf_glu.instruments.probe import evaluating
from hf_glu.publishing.export.samples import no_cache, on_samples, sample

TRACED = (2, 12)  # sequences, tokens


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A kind of graph.

    Attributes:
        backend: what Transformers calls it.
        packages: what it needs.
    """

    backend: str
    packages: tuple[str, ...] = ()


RUNTIMES = {
    "onnx": Runtime(backend="onnx", packages=("onnx", "onnxscript", "onnxruntime")),
    "program": Runtime(backend="dynamo"),
    "openvino": Runtime(backend="openvino", packages=("openvino",)),
    "executorch": Runtime(backend="executorch", packages=("executorch",)),
}


# OpenVINO computes in bfloat16 where the CPU can, whatever the graph says
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


def check_packages(kind: str) -> None:
    """Check that there is what a kind of graph needs.

    Raises:
        MissingPackageError: a package isn't installed.
        IncompatibleTransformersError: Transformers or torch is too old for graphs.
        OptionError: Transformers has graphs, but none of this kind.
    """
    for name in (EXPORT_BACKENDS, EXPORTER_CLASS, EXPORTED, IS_EXPORTING):
        name.find()
    if RUNTIMES[kind].backend not in EXPORT_BACKENDS.find():
        raise OptionError(f"the installed Transformers has no exporter {RUNTIMES[kind].backend!r}")
    need(*RUNTIMES[kind].packages, what=f"export as {kind}")


def write_graph(model: Any, kind: str, folder: Path, **options: Any) -> None:
    """Write the graph of a model into a folder, with its config.

    Args:
        model: in the dtype that the graph is to have; float32 runs everywhere.
        kind: of `RUNTIMES`.
        folder: where to.
        options: of Transformers' export config, such as a quantizer.

    Raises:
        MissingPackageError: a package isn't installed.
        OptionError: the model takes no token ids.
        ConversionError: the model can't be traced.
    """
    check_convertible(model)
    check_packages(kind)
    if find_mixers(model):
        raise ConversionError(
            f"{type(model).__name__} is a state-space model: Transformers' exporter writes its scan down for one "
            "number of tokens, so that the graph would be of no use; run it in torch"
        )
    inputs = sample(model, *TRACED)
    with evaluating(model), quiet(), at_most(longest(model)):
        try:
            _trace(model, kind, inputs, options).save_pretrained(folder)
        except Exception as error:  # whatever the tracer met
            raise ConversionError(
                f"{type(model).__name__} can't be exported as {kind}, since the tracer says: {first_line(error)}"
            ) from error


def _trace(model: Any, kind: str, inputs: dict[str, Tensor], options: dict[str, Any]) -> Any:
    backend, auto = RUNTIMES[kind].backend, torch.export.Dim.AUTO
    length = auto(max=longest(model))  # which lengths are one, the tracer finds out
    shapes = {name: {0: auto, value.ndim - 1: length} for name, value in inputs.items()}
    config = EXPORT_BACKENDS.find()[backend].config(dynamic=True, dynamic_shapes=shapes, **options)
    return EXPORTER_CLASS.find()(backend)().export(model, {**inputs, **no_cache(model)}, config)


def load_graph(folder: Path, threads: int | None = None) -> Any:
    """Return a written graph, which is called as the model is, and computes in float32.

    Args:
        folder: where it is.
        threads: of ONNX Runtime; None: torch's number.
    """
    options: dict[str, Any] = trusted(EXPORTED.find().from_pretrained)
    if (folder / "model.onnx").is_file():
        from onnxruntime import SessionOptions

        options["session_options"] = session = SessionOptions()
        session.intra_op_num_threads = threads or torch.get_num_threads()
    elif any(folder.glob("*.xml")):
        options["config"] = FLOAT32
    with quiet():
        return EXPORTED.find().from_pretrained(folder, **options)


def graph_outputs(model: Any, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return what the graph in a folder gives on the inputs that ``model`` is compared on.

    Raises:
        ConversionError: it can't be run on them.
    """
    graph = load_graph(folder)
    try:
        with torch.no_grad(), quiet():
            return on_samples(model, lambda inputs: graph(**inputs))
    except Exception as error:  # a runtime's own
        raise ConversionError(
            f"{type(model).__name__} is traced, but its graph doesn't run on other inputs: {first_line(error)}"
        ) from error


def longest(model: Any) -> int:
    """Return how many tokens a graph takes: as many as the model has positions."""
    return longest_text(model.config) or LONGEST.get()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep from the user what the exporters print, log and warn of on their way."""
    level = logging.root.manager.disable
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, level)
        yield
