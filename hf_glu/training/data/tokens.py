"""Tokenizing words that have labels: a word's label stands at its first token, the others have none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_glu.errors import DataError, OptionError
from hf_glu.tasks.checking import LABEL
from hf_glu.tasks.metrics.scores import NO_ANSWER
from hf_glu.tasks.table import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

IGNORED = -100
LEFT, RIGHT = "left", "right"


def tokenize_words(
    task: Task, raw: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, list[list[int]]]:
    """Tokenize lists of words and their labels.

    Args:
        task: the task; its first column has the words.
        raw: its rows.
        tokenizer: the model's.
        max_length: tokens after which a row is cut.

    Returns:
        One model input for each row, with ``labels`` for its tokens; and for each row the place of each word's first
        token, `NO_ANSWER` for one that the row was cut before, or that has no token.

    Raises:
        OptionError: the tokenizer doesn't say which tokens are of which word.
        DataError: a row of whose words the tokenizer makes nothing.
    """
    if not tokenizer.is_fast:
        raise OptionError(f"{type(tokenizer).__name__} doesn't say which tokens are of which word: take a fast one")
    column, space = task.columns[0], _needs_space(tokenizer)

    def tokenize(batch: Mapping[str, list[Any]], numbers: Sequence[int]) -> dict[str, list[Any]]:
        words = [[f"{' ' * (space and at > 0)}{word}" for at, word in enumerate(row)] for row in batch[column]]
        found = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
        places, labels = [], []
        for at, (row, given) in enumerate(zip(words, batch[LABEL], strict=True)):
            first: dict[int, int] = {}
            for place, word in enumerate(found.word_ids(at)):
                if word is not None:
                    first.setdefault(word, place)
            if not first:
                raise DataError(f"{task.name}: the tokenizer makes nothing of row {numbers[at] + 1}: {row[:8]}")
            placed = {place: given[word] for word, place in first.items()}
            labels.append([placed.get(place, IGNORED) for place in range(len(found["input_ids"][at]))])
            places.append([first.get(word, NO_ANSWER) for word in range(len(row))])
        return {**found, "labels": labels, "places": places}

    data = raw.map(
        tokenize, batched=True, with_indices=True, remove_columns=raw.column_names, load_from_cache_file=False
    )
    return data.remove_columns("places"), list(data["places"])


def _needs_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether words but the first are tokenized as in a text only with a space before them (GPT-2)."""
    text, words, spaced = (
        tokenizer(given, add_special_tokens=False, is_split_into_words=isinstance(given, list))["input_ids"]
        for given in ("a a", ["a", "a"], ["a", " a"])
    )
    return bool(text != words and text == spaced)


def padding_side(config: PreTrainedConfig) -> str:
    """Return where a model's inputs are padded, whatever its tokenizer says, which may be meant for generating.

    Padding on the left would move tokens to other absolute positions; XLNet has none, and classifies by the last place.
    """
    return LEFT if getattr(config, "summary_type", None) == "last" else RIGHT


def padded(rows: Sequence[Sequence[int]], length: int, side: str = RIGHT) -> Tensor:
    """Return labels ``[rows, length]``, with `IGNORED` where a row has none."""
    filled = ([*row, *[IGNORED] * (length - len(row))] for row in rows)
    if side == LEFT:
        filled = ([*[IGNORED] * (length - len(row)), *row] for row in rows)
    return torch.tensor(list(filled))
