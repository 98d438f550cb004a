"""Tokenizing pairs of texts, one to read and one to write.

An encoder-decoder is given both by themselves. A decoder is given one sequence, the source and after it the target with
the token that ends a text; only the target has labels. To write, it is given the source alone, padded on the left.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_glu.errors import DataError, OptionError
from hf_glu.tasks.checking import LABEL
from hf_glu.tasks.table import Task
from hf_glu.training.data.tokens import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
TARGET = 128  # tokens of a target, where nobody says how many


def writes(config: PreTrainedConfig) -> bool:
    """Return whether a model of this config writes texts: an encoder-decoder, or a decoder that is no encoder, too."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if config.is_encoder_decoder or getattr(config, "is_decoder", False):
        return True
    kind = config.model_type
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def tokenize_pairs(
    task: Task, raw: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, max_target: int, *, joined: bool
) -> Dataset:
    """Tokenize the sources and targets of a split.

    Args:
        task: the task.
        raw: its rows.
        tokenizer: the model's.
        max_length, max_target: tokens after which a source, and a target with its end, are cut.
        joined: whether both are one sequence.

    Raises:
        DataError: the tokenizer makes nothing of a source.
    """
    from datasets import Dataset

    sources = tokenizer([task.prompt(row) for row in raw], truncation=True, max_length=max_length)
    texts, room = list(raw[LABEL]), max_target - joined
    given = {"text": texts, "add_special_tokens": False} if joined else {"text_target": texts}
    targets = tokenizer(**given)["input_ids"]
    if cut := sum(len(each) > room for each in targets):
        _log.warning("%d of %d texts to write are longer than %d tokens and cut there", cut, len(texts), max_target)
        targets = tokenizer(**given, truncation=True, max_length=room)["input_ids"]
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for number, (source, target) in enumerate(zip(sources["input_ids"], targets, strict=True), start=1):
        ids = source
        if joined:
            prompt = _without_end(source, tokenizer.eos_token_id)
            target = [*target, tokenizer.eos_token_id]
            ids, target = [*prompt, *target], [*[IGNORED] * len(prompt), *target]
            source = prompt
        if not source:
            raise DataError(
                f"{task.name}, row {number}: the tokenizer makes nothing of {task.prompt(raw[number - 1])!r}"
            )
        for name, value in zip(columns, (ids, [1] * len(ids), target), strict=True):
            columns[name].append(value)
    return Dataset.from_dict(columns)


def _without_end(ids: Sequence[int], end: int) -> list[int]:
    """Return the tokens of a text without the one that some tokenizers end each text with."""
    return list(ids[:-1] if ids and ids[-1] == end else ids)


def collate_prompts(
    columns: dict[str, Any], tokenizer: PreTrainedTokenizerBase, device: torch.device | None
) -> dict[str, Tensor]:
    """Make a batch of the sources alone of sequences of source and target, padded on the left."""
    pairs = zip(columns["input_ids"], columns["labels"], strict=True)
    ids = [each[: labels.count(IGNORED)] for each, labels in pairs]
    given = {"input_ids": ids, "attention_mask": [[1] * len(each) for each in ids]}
    batch = tokenizer.pad(given, padding_side="left", return_tensors="pt")
    return {key: value.to(device) for key, value in batch.items()}


def settle_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a decoder end its texts at the token that its training texts end with.

    Raises:
        OptionError: the tokenizer has no such token.
    """
    if tokenizer.eos_token_id is None:
        raise OptionError("the tokenizer has no token that ends a text: set tokenizer.eos_token and save it")
    config = model.generation_config
    known = config.eos_token_id
    ends = known if isinstance(known, list) else [] if known is None else [known]
    if tokenizer.eos_token_id not in ends:
        config.eos_token_id = [*ends, tokenizer.eos_token_id] if ends else tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
