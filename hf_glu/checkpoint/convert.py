"""Convert a checkpoint on disk into a new folder, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hf_glu.checkpoint.beside import keep_beside, main_dtype
from hf_glu.checkpoint.config_file import reading
from hf_glu.checkpoint.folders import check_destination, copy_other_files, staged_folder
from hf_glu.checkpoint.gguf import gguf_file, is_gguf
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.loading import load_model, load_skeleton, load_tokenizer
from hf_glu.checkpoint.provenance import base_of, write_report
from hf_glu.conversion import Change, Plan, Report, plan, to_native
from hf_glu.conversion.changes.t5_layout import dense_t5_sites
from hf_glu.conversion.steps import Target


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    target: Target | Change | None = None,
    *,
    calibration: Sequence[str] | None = None,
    distill_steps: int | None = None,
    native: bool = False,
    check: bool | str = True,
    base_model: str | None = None,
    heal: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Report:
    """Convert the checkpoint ``source`` (local folder, Hub id or GGUF file) into the new folder ``destination``.

    Weights (those without a place in the model's class, too), config, tokenizer and other files are there afterwards,
    and the report as ``hf_glu_report.json``; where anything goes wrong, ``destination`` isn't, and ``source`` is never
    written to. What can't be done is said before weights are read.

    Args:
        source, destination: the checkpoints.
        target, distill_steps, check, options: as in `hf_glu.convert`.
        calibration: texts, for the tokenizer beside the checkpoint.
        native: whether to write a T5 in the layout of T5 v1.1, which loads without hf_glu (see `hf_glu.to_native`).
        base_model: what the model card calls ``source``, where that is a folder.
        heal: given the converted model before it is written, trains it in place; returns the report, plain data.

    Raises:
        CheckpointError: one of the two can't be read or written.
        HfGluError: as `hf_glu.convert`.
    """
    folder, base = gguf_file(source) if is_gguf(source) else resolve(source), base_of(source, base_model)
    check_destination(destination)
    fitted = calibration is not None and not isinstance(target, Change)
    planned = plan_checkpoint(folder, target, fitted=fitted, native=native, **options)
    tokenizer = load_tokenizer(folder) if calibration is not None else None
    with staged_folder(destination) as stage:
        model = load_model(folder, dtype=main_dtype(folder))
        model_class = type(model)
        with reading(source, why="can't be converted"):  # a model that loads needn't run
            report = planned.apply(
                model, calibration=calibration, tokenizer=tokenizer, distill_steps=distill_steps, check=check
            )
        if heal is not None:
            report = replace(report, healing=heal(model))
        if native:
            to_native(model)
        model.save_pretrained(stage)
        keep_beside(folder, stage, model_class)
        copy_other_files(folder, stage)
        write_report(stage, {**report.to_dict(), "base": base})
    return report


def plan_checkpoint(
    source: str | os.PathLike[str], target: Target | Change | None = None, *, fitted: bool = False,
    native: bool = False, **options: Any,
) -> Plan:  # fmt: skip
    """Plan the conversion of a checkpoint, of which only the config is read.

    Args:
        source: the checkpoint.
        target, fitted, options: as in `hf_glu.plan`.
        native: whether it is to be a T5 in the layout of T5 v1.1, which has no biases.

    Raises:
        CheckpointError: it can't be read.
        HfGluError: as `hf_glu.plan`.
    """
    skeleton = load_skeleton(source)
    if native:
        dense_t5_sites(skeleton)
        options["bias"] = False
    return plan(skeleton, target, fitted=fitted, **options)
