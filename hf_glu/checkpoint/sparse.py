"""Write a checkpoint whose FFNs leave small entries out into a new folder, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_glu.checkpoint.beside import keep_beside, main_dtype
from hf_glu.checkpoint.files import REPORT_FILE
from hf_glu.checkpoint.folders import copy_other_files
from hf_glu.checkpoint.gguf import gguf_file, is_gguf
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.jsonio import read_object
from hf_glu.checkpoint.loading import load_model, load_tokenizer
from hf_glu.checkpoint.provenance import base_of, write_report
from hf_glu.conversion.gguf import forget_gguf
from hf_glu.conversion.sparse_report import SparsityReport
from hf_glu.conversion.sparsify import sparsify


def sparsify_checkpoint(
    source: str | os.PathLike[str], stage: Path, texts: Sequence[str], **options: Any
) -> SparsityReport:
    """Make ``source`` (local folder, Hub id or GGUF file) sparse, and write it into the empty folder ``stage``.

    Weights, config, tokenizer and other files are there afterwards, and the report, added to that of an earlier
    conversion, as ``hf_glu_report.json``.

    Args:
        source, stage: the checkpoint, and an empty folder, such as `staged_folder` gives.
        texts: the calibration.
        options: as in `hf_glu.sparsify`.

    Raises:
        CheckpointError: it can't be read.
        HfGluError: as `hf_glu.sparsify`.
    """
    folder, base = gguf_file(source) if is_gguf(source) else resolve(source), base_of(source)
    tokenizer, model = load_tokenizer(folder), load_model(folder, dtype=main_dtype(folder))
    report = sparsify(model, texts, tokenizer=tokenizer, **options)
    assert report is not None  # keep=1 is refused before
    forget_gguf(model)
    model.save_pretrained(stage)
    keep_beside(folder, stage, type(model))
    copy_other_files(folder, stage)
    earlier = Path(folder) / REPORT_FILE  # none where that is a GGUF file
    known = read_object(earlier) if earlier.is_file() else {"base": base}
    write_report(stage, {**known, "sparsity": report.to_dict()})
    return report
