"""What a training loop asks of its data, whatever is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch: TypeAlias = dict[str, Tensor]


class Order(Protocol):
    """The units of each optimizer step: the same on one process and on several, and after a resume."""

    @property
    def steps_per_epoch(self) -> int:
        """How many steps a pass over the data takes."""
        ...

    def __getitem__(self, step: int) -> Sequence[int]:
        """Return the units of optimizer step ``step``, from 0 on."""
        ...

    def epoch(self, step: int) -> int:
        """Return in which pass over the data a step is, from 0 on."""
        ...


class Examples(Protocol):
    """Training data: inputs by number, batches of them, and the loss of a batch.

    Inputs that are trained together, such as the candidates of a choice, are a unit; else each input is one.
    What is drawn at random for an input, such as its masks, may depend on its number, the epoch and the seed only, so
    that several processes, and a resumed run, see what one process sees.
    """

    def plan(self, batch_size: int, seed: int) -> Order:
        """Return which units come in which step."""
        ...

    def rows(self, units: Sequence[int]) -> Sequence[int]:
        """Return the inputs of units."""
        ...

    def tokens(self, rows: Sequence[int]) -> int:
        """Count the tokens of inputs."""
        ...

    def batch(self, rows: Sequence[int], epoch: int, device: torch.device | None = None) -> Batch:
        """Make one padded batch of the inputs ``rows``."""
        ...

    def items(self, rows: Sequence[int], epoch: int) -> int:
        """Count what the loss of a batch is the mean over, such as target tokens."""
        ...

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return the mean loss of a batch."""
        ...


def with_labels(batch: Batch) -> Batch:
    """Return a batch without weight whose loss is a number: the mean over no label at all is NaN, and so is 0 NaN."""
    labels = batch.get("labels")
    return batch if labels is None else {**batch, "labels": labels.clamp(min=0)}
