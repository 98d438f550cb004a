"""The whole job: load, convert, fine-tune, evaluate, save, and reload in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from hf_glu.checkpoint import first_line, staged_folder
from hf_glu.conversion import Report, convert
from hf_glu.errors import CheckpointError
from hf_glu.hub import resolve
from hf_glu.training.data import Examples
from hf_glu.training.loop import TrainingOptions, TrainingResult, finetune, predict, tokenize
from hf_glu.training.metrics import Accuracy


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One model, fine-tuned.

    Attributes:
        accuracy_before, accuracy: on the validation data, before and after fine-tuning.
        parameters: number of parameters.
        training: what the loop did.
        report: of the conversion, where there was one.
        reloaded_equal: whether the saved model, loaded in a fresh process, gave bitwise the same logits.
    """

    accuracy_before: float
    accuracy: float
    parameters: int
    training: TrainingResult
    report: Report | None = None
    reloaded_equal: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as plain data."""
        return {
            "accuracy_before": self.accuracy_before,
            "accuracy": self.accuracy,
            "parameters": self.parameters,
            "training": self.training.to_dict(),
            "conversion": self.report.to_dict() if self.report else None,
            "reloaded_equal": self.reloaded_equal,
        }


def load_classifier(source: str, labels: tuple[str, ...], seed: int) -> tuple[Any, Any]:
    """Return a sequence classifier with a fresh head for ``labels``, the same for the same seed, and its tokenizer.

    Raises:
        CheckpointError: the checkpoint can't be found or loaded.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = resolve(source)
    names = dict(enumerate(labels))
    set_seed(seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, id2label=names, label2id={name: number for number, name in names.items()}, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{source} can't be loaded as a classifier: {first_line(error)}") from error
    if tokenizer.pad_token is None:  # GPT-2 has none
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def run_job(
    source: str,
    examples: Examples,
    options: TrainingOptions,
    *,
    to: str | None = None,
    layers: Any = None,
    output: Path | None = None,
) -> Outcome:
    """Convert (where ``to`` is given), fine-tune and evaluate a checkpoint; save it to ``output`` and check the reload.

    Args:
        source: local folder or Hub id of the pretrained checkpoint.
        examples: the task.
        options: how to train.
        to: gated activation; None fine-tunes the model as it is.
        layers: which layers are converted.
        output: new folder for model, tokenizer and report; None saves nothing.

    Raises:
        HfGluError: bad input, before anything is trained.
    """
    model, tokenizer = load_classifier(source, examples.labels, options.seed)
    train, validation = (
        tokenize(data, tokenizer, options.max_length) for data in (examples.train, examples.validation)
    )
    report = convert(model, to, layers=layers) if to else None
    title = to or "dense"
    before = _accuracy(predict(model, validation, tokenizer, title=f"{title}: before"), validation)
    result = finetune(model, train, tokenizer, options, title=f"{title}: fine-tune")
    logits = predict(model, validation, tokenizer, title=f"{title}: evaluate")
    equal = None
    if output is not None:
        equal = _save(model, tokenizer, output, validation, logits)
    return Outcome(
        accuracy_before=before,
        accuracy=_accuracy(logits, validation),
        parameters=model.num_parameters(),
        training=result,
        report=report,
        reloaded_equal=equal,
    )


def _accuracy(logits: torch.Tensor, data: Any) -> float:
    result = Accuracy().compute(predictions=logits.argmax(-1).tolist(), references=data["labels"])
    return float(result["accuracy"])


def _save(model: Any, tokenizer: Any, output: Path, data: Any, logits: torch.Tensor) -> bool:
    with staged_folder(output) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        again = fresh_logits(stage, data)
    return torch.equal(again, logits)


def fresh_logits(folder: Path, data: Any) -> torch.Tensor:
    """Return the logits of the classifier in ``folder`` on tokenized ``data``, computed in a new process.

    Raises:
        CheckpointError: the new process can't load it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        data.save_to_disk(f"{scratch}/data")
        command = [
            sys.executable,
            "-m",
            "hf_glu.training.reload",
            str(folder),
            f"{scratch}/data",
            f"{scratch}/logits.pt",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckpointError(f"{folder} can't be loaded again: {done.stderr.strip().splitlines()[-1]}")
        return torch.load(f"{scratch}/logits.pt", weights_only=True)
