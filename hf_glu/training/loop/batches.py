"""The examples of each optimizer step: the same on one process and on several, and after a resume."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

CHUNK = 50  # batches whose examples are sorted by length together


class BatchPlan:
    """Batches of examples of like lengths, in an order that only the seed, the epoch and the data decide.

    Args:
        lengths: of each example, in tokens.
        batch_size: examples of one optimizer step, on all processes together.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = list(lengths), batch_size, seed
        self.steps_per_epoch = max(1, math.ceil(len(self._lengths) / batch_size))
        self._epoch, self._batches = -1, [[0]]

    def __getitem__(self, step: int) -> list[int]:
        """Return the examples of optimizer step ``step``, from 0 on."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return self._batches[number]

    def epoch(self, step: int) -> int:
        """Return in which pass over the data optimizer step ``step`` is, from 0 on."""
        return step // self.steps_per_epoch

    def _shuffle(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self._seed * 100_003 + epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        size = self._batch_size * CHUNK
        chunks = [order[begin : begin + size] for begin in range(0, len(order), size)]
        ordered = [index for chunk in chunks for index in sorted(chunk, key=lambda i: -self._lengths[i])]
        batches = [ordered[begin : begin + self._batch_size] for begin in range(0, len(ordered), self._batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def share(batch: Sequence[int], process: int, processes: int, accumulate: int) -> list[list[int]]:
    """Return the micro-batches of one process: every ``processes``-th example, in ``accumulate`` parts at most.

    All processes have as many, of which the last may be empty: where weights are sharded, each pass takes them all.
    """
    mine, most = list(batch[process::processes]), math.ceil(len(batch) / processes)
    return [mine[part::accumulate] for part in range(min(accumulate, most))]
