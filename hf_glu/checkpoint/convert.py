"""Convert a checkpoint on disk into a new folder, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hf_glu.checkpoint.config_file import reading
from hf_glu.checkpoint.files import REPORT_FILE
from hf_glu.checkpoint.folders import check_destination, copy_other_files, staged_folder
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.checkpoint.loading import encode, forget_code, load_model, load_skeleton, load_tokenizer, read_texts
from hf_glu.checkpoint.provenance import base_of
from hf_glu.conversion import Report, convert, plan, to_native
from hf_glu.conversion.converting import check_experts
from hf_glu.conversion.steps import Target
from hf_glu.conversion.t5_layout import dense_t5_sites

# names that were defined here before, for those who import them from here
__all__ = [
    "REPORT_FILE",
    "check_destination",
    "convert_checkpoint",
    "copy_other_files",
    "encode",
    "forget_code",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "read_texts",
    "staged_folder",
]


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    target: Target | None = None,
    *,
    width: int | str = "keep",
    layers: Any = None,
    exclude: str | None = None,
    calibration: Sequence[str] | None = None,
    distill_steps: int | None = None,
    native: bool = False,
    experts: str | None = None,
    top_k: int | None = None,
    check: bool | str = True,
    base_model: str | None = None,
) -> Report:
    """Convert the checkpoint ``source`` (local folder or Hub id) into the new folder ``destination``.

    Weights, config, tokenizer and other files are there afterwards, and the report as ``hf_glu_report.json``; where
    anything goes wrong, ``destination`` isn't, and ``source`` is never written to.

    Args:
        source, destination: the checkpoints.
        target, width, layers, exclude, distill_steps, experts, top_k, check: as in `hf_glu.convert`.
        calibration: texts, for the tokenizer beside the checkpoint.
        native: whether to write a T5 in the layout of T5 v1.1, which loads without hf_glu (see `hf_glu.to_native`).
        base_model: what the model card calls ``source``, where that is a folder.

    Raises:
        CheckpointError: one of the two can't be read or written.
        HfGluError: as `hf_glu.convert`.
    """
    folder, base = resolve(source), base_of(source, base_model)
    check_destination(destination)
    fitted, bias = calibration is not None, False if native else None
    # fail early, before weights are read
    skeleton = load_skeleton(folder)
    if native:
        dense_t5_sites(skeleton)
    if experts is not None:
        resized = fitted or width != "keep" or bias is not None
        check_experts(skeleton, target, experts, top_k, layers=layers, exclude=exclude, resized=resized)
    elif target is not None:
        plan(skeleton, target, width=width, layers=layers, exclude=exclude, fitted=fitted, bias=bias)
    tokenizer = load_tokenizer(folder) if fitted else None
    with staged_folder(destination) as stage:
        model = load_model(folder)
        with reading(source, why="can't be converted"):  # a model that loads needn't run
            report = convert(
                model, target, width=width, layers=layers, exclude=exclude, calibration=calibration,
                tokenizer=tokenizer, distill_steps=distill_steps, bias=bias, experts=experts, top_k=top_k, check=check,
            )  # fmt: skip
        if native:
            to_native(model)
        model.save_pretrained(stage)
        copy_other_files(folder, stage)
        write_json(stage / REPORT_FILE, {**report.to_dict(), "base": base})
    return report
