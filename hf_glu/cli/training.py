"""``hf-glu finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_glu.cli import tables
from hf_glu.cli.commands import Json, Layers, app
from hf_glu.errors import OptionError


@app.command()
def finetune(
    model: Annotated[str, typer.Option(help="Pretrained checkpoint: local folder or Hub id.")],
    output: Annotated[Path | None, typer.Option(help="New folder for model, tokenizer, report and card.")] = None,
    to: Annotated[str | None, typer.Option(help="Convert to this gated activation first.")] = None,
    task: Annotated[str | None, typer.Option(help="A task from the Hub: sst2, cola, mrpc, rte.")] = None,
    data: Annotated[Path | None, typer.Option(help="File or folder with columns text (or sentence) and label.")] = None,
    validation: Annotated[Path | None, typer.Option(help="Validation file; else a tenth of DATA.")] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Fine-tune the dense model the same way, too.")] = False,
    layers: Layers = None,
    epochs: float = 3.0,
    batch_size: int = 32,
    lr: float = 2e-5,
    max_length: int = 128,
    precision: Annotated[str, typer.Option(help="auto, no, bf16 or fp16.")] = "auto",
    seed: int = 0,
    json: Json = False,
) -> None:
    """Convert a checkpoint, fine-tune it as a classifier with Accelerate, evaluate and save it."""
    from hf_glu.report import finetune_and_report
    from hf_glu.training.data import load_files, load_task
    from hf_glu.training.loop import TrainingOptions

    if (task is None) == (data is None):
        raise OptionError("give either --task (from the Hub) or --data (local files)")
    options = TrainingOptions(
        epochs=epochs, batch_size=batch_size, lr=lr, max_length=max_length, precision=precision, seed=seed
    )
    examples = load_task(task) if task else load_files(str(data), validation=validation, seed=seed)
    result = finetune_and_report(
        model, examples, options, dataset=task or Path(str(data)).name, to=to, layers=layers, output=output,
        baseline=baseline,
    )  # fmt: skip
    tables.emit(result, tables.finetuned, json=json)
