"""A fine-tuning job with its baseline, as one result: the table, ``report.json`` and the model card."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from hf_glu.activation import registry
from hf_glu.card import write_card
from hf_glu.checkpoint import REPORT_FILE, check_destination
from hf_glu.jsonio import write_json
from hf_glu.training.data import Examples
from hf_glu.training.job import Outcome, run_job
from hf_glu.training.loop import TrainingOptions


def finetune_and_report(
    source: str,
    examples: Examples,
    options: TrainingOptions,
    *,
    dataset: str,
    base_model: str | None = None,
    to: str | None = None,
    layers: Any = None,
    output: Path | None = None,
    baseline: bool = False,
) -> dict[str, Any]:
    """Run `run_job`, and once more without conversion where ``baseline`` is set; return everything as plain data.

    ``base_model`` names the source on the card, where ``source`` is a local folder. ``output`` holds the model, its
    tokenizer, ``hf_glu_report.json`` and, where it was converted, a model card.

    Raises:
        HfGluError: bad input, before anything is trained.
    """
    start = time.perf_counter()
    if to:
        registry[to]
    if output is not None:
        check_destination(output)
    dense = run_job(source, examples, options) if baseline and to else None
    outcome = run_job(source, examples, options, to=to, layers=layers, output=output)
    result = {
        "model": source,
        "dataset": dataset,
        "activation": to,
        "examples": {"train": len(examples.train), "validation": len(examples.validation)},
        "options": options.to_dict(),
        "rows": _rows(dense, outcome, to),
        "dense": dense.to_dict() if dense else None,
        "outcome": outcome.to_dict(),
        "seconds": time.perf_counter() - start,
    }
    if output is not None:
        write_json(output / REPORT_FILE, result)
        if to:
            write_card(
                output, title=output.name, base_model=base_model or source, dataset=dataset, activation=to,
                validation_examples=len(examples.validation), seed=options.seed, dense=dense, converted=outcome,
            )  # fmt: skip
    return result


def _rows(dense: Outcome | None, outcome: Outcome, to: str | None) -> list[dict[str, Any]]:
    """Return the final table: dense baseline, converted before and after."""
    rows: list[dict[str, Any]] = []
    if dense:
        rows.append(_row("dense, fine-tuned", dense.accuracy, dense))
    if to:
        rows.append({**_row(f"{to}, converted", outcome.accuracy_before, outcome), "seconds": None})
    rows.append(_row(f"{to or 'dense'}, fine-tuned", outcome.accuracy, outcome))
    return rows


def _row(name: str, accuracy: float, outcome: Outcome) -> dict[str, Any]:
    difference = outcome.report.max_abs_difference if outcome.report else None
    return {
        "model": name,
        "accuracy": accuracy,
        "parameters": outcome.parameters,
        "max_abs_difference": difference if name.endswith("converted") else None,
        "seconds": outcome.training.seconds,
    }
