"""The mixin of modules that read their model's tokens and cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.context.reading import Reading
from hf_glu.errors import TrainingError


class Reader(nn.Module):
    """A module that is told, before each forward pass of its model, which tokens come.

    Attributes:
        slot: its name in the model: the key of its states in a cache.
        reading: the tokens; None outside of the model's forward.
        cache: where its states are kept; None: nowhere.
    """

    slot: str = ""
    reading: Reading | None = None
    cache: Any = None

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Do what there is to do before its block runs; ``inputs`` are the block's, by name."""

    def current(self) -> Reading | None:
        """Return what is known about the tokens.

        Raises:
            TrainingError: a layer is computed once more in the backward pass by a checkpointing that is not
                Transformers' own, which doesn't know any more which tokens were padding.
        """
        if self.reading is None and self.slot and not torch.compiler.is_compiling():
            if torch._C._current_graph_task_id() != -1:
                raise TrainingError(
                    f"{self.slot} is computed again in the backward pass without its model: use the model's own "
                    "gradient_checkpointing_enable()"
                )
        return self.reading

    def sequences(self, x: Tensor) -> Tensor:
        """Return ``x`` as ``[B, T, W]``: some families hand their FFNs the tokens of all sequences in one row."""
        reading = self.current()
        if x.ndim == 3:
            return x
        if x.ndim == 2 and reading is not None and x.shape[0] == reading.batch * reading.length:
            return x.view(reading.batch, reading.length, -1)
        return x.reshape(-1, 1, x.shape[-1])
