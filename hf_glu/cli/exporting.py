"""``hf-glu export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_glu.cli import tables
from hf_glu.cli.commands import Json, app
from hf_glu.errors import OptionError


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint: local folder or Hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New folder.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="A graph for ONNX Runtime and others (the default).")] = False,
    program: Annotated[bool, typer.Option("--program", help="A program of torch.export, model.pt2.")] = False,
    openvino: Annotated[bool, typer.Option("--openvino", help="A graph for OpenVINO.")] = False,
    executorch: Annotated[bool, typer.Option("--executorch", help="A program for ExecuTorch.")] = False,
    native: Annotated[
        bool, typer.Option("--native", help="A stock architecture, where one computes the same, for all that reads it.")
    ] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="The same for llama.cpp's converter, if that computes the activation.")
    ] = False,
    tolerance: Annotated[
        float | None, typer.Option(help="The most that outputs may differ by, relative where they are above 1: 1e-4.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a checkpoint for runtimes without hf_glu, and compare what they compute with the model."""
    given = {"onnx": onnx, "program": program, "openvino": openvino, "executorch": executorch}
    chosen = [name for name, asked in {**given, "native": native, "gguf": gguf}.items() if asked]
    if len(chosen) > 1:
        raise OptionError(f"one format at a time, got --{' and --'.join(chosen)}")

    from hf_glu.cli import early

    early.check_destinations(destination)
    early.check_sources(source)

    from hf_glu.publishing.export import TOLERANCE
    from hf_glu.publishing.export import export as run_export

    result = run_export(
        source, destination, format=(chosen or ["onnx"])[0], tolerance=TOLERANCE if tolerance is None else tolerance
    )
    tables.emit(result, tables.exported, json=json)
