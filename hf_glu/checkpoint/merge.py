"""Merge checkpoints on disk into a new folder with a mixture of their experts, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_glu.checkpoint.beside import keep_beside, main_dtype
from hf_glu.checkpoint.folders import check_destination, copy_other_files
from hf_glu.checkpoint.gguf import gguf_file, is_gguf
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.checkpoint.loading import load_model, load_tokenizer
from hf_glu.checkpoint.provenance import CARRIED, base_of, carried, naming, write_report
from hf_glu.conversion import Report
from hf_glu.conversion.experts.merging.models import merge_with_report
from hf_glu.errors import CheckpointError, OptionError


def merge_checkpoints(
    sources: Sequence[str | os.PathLike[str]], stage: Path, *, router: str = "random",
    prompts: Sequence[Sequence[str]] | None = None, attention: str = "average", top_k: int = 2,
) -> Report:  # fmt: skip
    """Merge the checkpoints ``sources`` (local folders, Hub ids or GGUF files) into the empty folder ``stage``.

    Weights, config, and the first one's tokenizer, other files and tensors that the model has no place for are there
    afterwards, and the report of making the experts, with the names of all, as ``hf_glu_report.json``.

    Args:
        sources, stage: the checkpoints, and an empty folder, such as `staged_folder` gives.
        prompts: texts for each of them, for the tokenizer beside the first.
        router, attention, top_k: as in `hf_glu.merge_experts`.

    Raises:
        CheckpointError: one can't be read.
        OptionError: they have other tokenizers.
        HfGluError: as `hf_glu.merge_experts`.
    """
    folders = [gguf_file(source) if is_gguf(source) else resolve(source) for source in sources]
    check_destination(stage)
    tokenizer = _tokenizer(folders)
    if prompts is not None and tokenizer is None:
        load_tokenizer(folders[0])  # which says that there is none
    named = [naming(source) for source in sources]
    model, report = merge_with_report(
        [load_model(folder, dtype=main_dtype(folder)) for folder in folders], router=router, prompts=prompts,
        tokenizer=tokenizer, attention=attention, top_k=top_k, names=[each["name"] for each in named],
    )  # fmt: skip
    model.save_pretrained(stage)
    keep_beside(folders[0], stage, type(model))
    copy_other_files(folders[0], stage)
    write_report(stage, {**report.to_dict(), "base": _base(sources[0], folders), "merged": named})
    return report


def _tokenizer(folders: Sequence[str | os.PathLike[str]]) -> Any:
    """Return the first checkpoint's tokenizer, None where it has none; raise OptionError where one has another."""
    found = [_tokenizer_of(folder) for folder in folders]
    for number, tokenizer in enumerate(found[1:], 2):
        if tokenizer is not None and found[0] is not None and tokenizer.get_vocab() != found[0].get_vocab():
            raise OptionError(f"model {number} has another vocabulary than the first: one tokenizer is for all")
    return found[0]


def _tokenizer_of(folder: str | os.PathLike[str]) -> Any:
    try:
        return load_tokenizer(folder)
    except CheckpointError:
        return None


def _base(first: str | os.PathLike[str], folders: Sequence[Path]) -> JsonObject:
    """Return the first checkpoint as the base, with what all cards say alike of license and language.

    Licenses that differ are ``other``, which a card has to explain, and are named.
    """
    cards = [carried(folder) for folder in folders]
    base: JsonObject = {key: value for key, value in base_of(first).items() if key not in CARRIED}
    alike = {key: value for key, value in cards[0].items() if all(card.get(key) == value for card in cards)}
    licenses = list(dict.fromkeys(str(card.get("license_name") or card.get("license") or "unknown") for card in cards))
    if len(licenses) > 1:
        alike = {key: value for key, value in alike.items() if key == "language"}
        alike |= {"license": "other", "license_name": "-and-".join(licenses)}
    return {**base, **alike}
