"""Blocks of text as a training loop takes them, stored or read while training; and measuring a model on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from hf_glu.config.showing import progress_bar
from hf_glu.errors import DataError
from hf_glu.training.data.prediction import eval_mode
from hf_glu.training.language.apart import apart
from hf_glu.training.language.blocks import BYTES, IDS
from hf_glu.training.language.objectives import IGNORED, VALIDATION, Objective, collate
from hf_glu.training.language.reading import reading_rows
from hf_glu.training.loop.accelerating import merge
from hf_glu.training.loop.batches import BatchPlan
from hf_glu.training.loop.examples import Batch

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEPT = 4096  # blocks whose masks are kept, since they are counted before they are batched
SHUFFLED = 1000  # documents of a stream among which the next one is drawn


class BlockExamples:
    """`hf_glu.training.loop.examples.Examples` of stored blocks.

    Args:
        blocks: from `hf_glu.training.language.blocks.Cutter`.
        objective: what is predicted of them.
        tokenizer: pads.
        seed: of masks.
    """

    def __init__(
        self, blocks: Dataset | None, objective: Objective, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> None:
        self.blocks, self.objective, self.tokenizer, self.seed = blocks, objective, tokenizer, seed
        self._made: dict[tuple[int, int], dict[str, list[int]]] = {}

    def __len__(self) -> int:
        return 0 if self.blocks is None else len(self.blocks)

    def plan(self, batch_size: int, seed: int) -> Any:
        """Return batches of blocks of like lengths."""
        assert self.blocks is not None
        import pyarrow.compute

        lengths = pyarrow.compute.list_value_length(self.blocks.with_format("arrow")[IDS]).to_pylist()
        return BatchPlan(lengths, batch_size, seed)

    def rows(self, units: Sequence[int]) -> Sequence[int]:
        """Return ``units``: each block is one."""
        return units

    def tokens(self, rows: Sequence[int]) -> int:
        """Count the tokens of blocks."""
        return sum(len(self.block(row)[IDS]) for row in rows)

    def block(self, row: int) -> dict[str, Any]:
        """Return one block."""
        assert self.blocks is not None
        return dict(self.blocks[row])

    def targets(self, row: int, epoch: int) -> dict[str, list[int]]:
        """Return inputs and labels of a block, the same whenever they are asked for."""
        key = (epoch, row)
        if key not in self._made:
            if len(self._made) >= KEPT:
                self._made.clear()
            draw = np.random.default_rng([self.seed, epoch - VALIDATION, row])
            self._made[key] = self.objective.targets(self.block(row), draw)
        return self._made[key]

    def batch(self, rows: Sequence[int], epoch: int, device: torch.device | None = None) -> Batch:
        """Make one padded batch."""
        batch = collate([self.targets(row, epoch) for row in rows], self.tokenizer)
        return {key: value.to(device) for key, value in batch.items()}

    def items(self, rows: Sequence[int], epoch: int) -> int:
        """Count the tokens that are predicted."""
        return sum(label != IGNORED for row in rows for label in self.targets(row, epoch)["labels"])

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the tokens that are predicted, in nats."""
        loss: Tensor = model(**apart(self.objective.given(batch))).loss
        return loss


class StreamPlan:
    """Blocks in the order in which they come; one pass has all steps.

    Args:
        batch_size: of one step.
        steps: of the training.
    """

    def __init__(self, batch_size: int, steps: int) -> None:
        self._batch_size, self.steps_per_epoch = batch_size, steps

    def __getitem__(self, step: int) -> list[int]:
        return list(range(step * self._batch_size, (step + 1) * self._batch_size))

    def epoch(self, step: int) -> int:
        """Return 0."""
        return 0


class StreamExamples(BlockExamples):
    """Blocks that are read when they are needed: each process reads all of them, and a resumed run from the start on.

    Args:
        stream: blocks; it begins again when it is through.
        steps: of the training.
        objective, tokenizer, seed: as of `BlockExamples`.
    """

    def __init__(
        self, stream: IterableDataset, steps: int, objective: Objective, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> None:
        super().__init__(None, objective, tokenizer, seed)
        self._stream, self._steps = stream, steps
        self._coming, self._read, self._room = self._blocks(), 0, KEPT
        self._kept: dict[int, dict[str, Any]] = {}

    def _blocks(self) -> Iterator[dict[str, Any]]:
        for epoch in count():
            self._stream.set_epoch(epoch)
            before = self._read
            with reading_rows():
                for block in self._stream:
                    self._read += 1
                    yield block
            if self._read == before:
                raise DataError("there is no text in the data")

    def plan(self, batch_size: int, seed: int) -> StreamPlan:
        """Return batches of blocks as they come."""
        self._room = max(KEPT, batch_size)
        return StreamPlan(batch_size, self._steps)

    def block(self, row: int) -> dict[str, Any]:
        """Return a block of this step: those of steps before are let go of."""
        while self._read <= row:
            block = next(self._coming)
            if len(self._kept) >= self._room:
                del self._kept[next(iter(self._kept))]
            self._kept[self._read - 1] = block
        return self._kept[row]


def check_predicted(examples: BlockExamples) -> None:
    """Check that there is something to measure.

    Raises:
        DataError: nothing of the text is predicted: it is so short that no mask hides any of it.
    """
    if not any(examples.items([row], VALIDATION) for row in range(len(examples))):
        raise DataError("the text to measure on is too short: no token of it is predicted")


def measure(
    model: PreTrainedModel,
    examples: BlockExamples,
    *,
    batch_size: int = 16,
    accelerator: Accelerator | None = None,
    title: str = "evaluate",
) -> dict[str, float]:
    """Return the loss in nats a token, its exponential, the perplexity, and of a causal model the bits of a byte."""

    def part(rows: range, batch: Batch) -> list[float]:
        items = examples.items(rows, VALIDATION)
        return [float(examples.loss(model, batch).double()) * items if items else 0.0, items]

    total, items = sums(model, examples, part, batch_size=batch_size, accelerator=accelerator, title=title)
    return language_metrics(examples, total / max(items, 1))


def language_metrics(examples: BlockExamples, loss: float) -> dict[str, float]:
    """Return a loss in nats a token, and what is computed of it."""
    metrics = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
    if examples.objective.name == "clm":
        assert examples.blocks is not None
        tokens = sum(len(ids) for ids in examples.blocks[IDS])
        metrics["bits_per_byte"] = loss / math.log(2) * tokens / sum(examples.blocks[BYTES])
    return metrics


def sums(
    model: PreTrainedModel,
    examples: BlockExamples,
    part: Callable[[range, Batch], list[float]],
    *,
    batch_size: int,
    accelerator: Accelerator | None = None,
    title: str = "evaluate",
) -> list[float]:
    """Return the sums of what ``part`` finds in each batch of validation data, without dropout and gradients.

    Every process takes every n-th batch, and all get all of the results.
    """
    batches = [range(at, min(at + batch_size, len(examples))) for at in range(0, len(examples), batch_size)]
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(model.parameters()).device
    found: dict[int, list[float]] = {}
    with eval_mode(model):
        for turn in progress_bar(range(math.ceil(len(batches) / processes)), desc=title, leave=False, disable=rank > 0):
            # a process that has run out does the last batch again: wrapped models compute together or not at all
            number = min(turn * processes + rank, len(batches) - 1)
            found[number] = part(batches[number], examples.batch(batches[number], VALIDATION, device))
    if accelerator:
        found = merge(accelerator, found)
    return [sum(values) for values in zip(*(found[number] for number in range(len(batches))), strict=True)]
