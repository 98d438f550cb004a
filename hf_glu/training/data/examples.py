"""The rows of a task as a training loop takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_glu.training.data.features import Features, collate, count_items, loss_of
from hf_glu.training.loop.batches import BatchPlan
from hf_glu.training.loop.examples import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TaskExamples:
    """`hf_glu.training.loop.examples.Examples` of tokenized rows.

    Args:
        features: the rows.
        tokenizer: pads the batches.
    """

    def __init__(self, features: Features, tokenizer: PreTrainedTokenizerBase) -> None:
        self.features, self.tokenizer = features, tokenizer
        self.units, self.lengths = features.units, [len(ids) for ids in features.data["input_ids"]]
        self._loss = loss_of(features)

    def plan(self, batch_size: int, seed: int) -> BatchPlan:
        """Return batches of units of like lengths."""
        longest = [max(self.lengths[row] for row in unit) for unit in self.units]
        return BatchPlan(longest, batch_size, seed)

    def rows(self, units: Sequence[int]) -> list[int]:
        """Return the inputs of units."""
        return [row for unit in units for row in self.units[unit]]

    def tokens(self, rows: Sequence[int]) -> int:
        """Count the tokens of inputs."""
        return sum(self.lengths[row] for row in rows)

    def batch(self, rows: Sequence[int], epoch: int, device: torch.device | None = None) -> Batch:
        """Make one padded batch; nothing in it is drawn at random."""
        return collate(self.features, self.tokenizer, rows, device)

    def items(self, rows: Sequence[int], epoch: int) -> int:
        """Count target tokens, choices or inputs."""
        return count_items(self.features, rows)

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return the mean loss; of a choice, that of a softmax over its candidates."""
        return self._loss(model, batch)
