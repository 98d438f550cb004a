"""The mixin of modules that read their model's tokens and cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.context.passes import current_pass
from hf_glu.activation.context.reading import Reading
from hf_glu.compat.of_torch import GRAPH_TASK
from hf_glu.errors import OptionError, TrainingError


class Reader(nn.Module):
    """A module that reads which tokens the running pass of its model has (`hf_glu.activation.context.passes`).

    Attributes:
        slot: its name in the model: the key of its states in a cache.
        needs_sequences: whether it must be given whole texts, in the order of their tokens.
    """

    slot: str = ""
    needs_sequences: bool = True

    def current(self) -> Reading | None:
        """Return what is known about the tokens; None outside of the model's forward.

        Raises:
            TrainingError: a layer is computed once more in the backward pass by a checkpointing that is not
                Transformers' own, which doesn't know any more which tokens were padding.
        """
        now = current_pass()
        if now is None and self.slot and not torch.compiler.is_compiling():
            if GRAPH_TASK.find()() != -1:
                why = "is computed again in the backward pass without its model"
                raise TrainingError(f"{self.slot} {why}: use the model's own gradient_checkpointing_enable()")
        return None if now is None else now.reading

    def cache(self) -> Any:
        """Return where its states are kept, None: nowhere."""
        now = current_pass()
        return None if now is None else now.cache

    def sequences(self, x: Tensor) -> Tensor:
        """Return ``x`` as ``[B, T, W]``: some families hand their FFNs the tokens of all sequences in one row.

        Raises:
            OptionError: ``x`` isn't what the text's tokens are: a part of them, or what a family has pooled of them.
        """
        reading = self.current()
        if reading is None:
            return x if x.ndim == 3 else x.reshape(-1, 1, x.shape[-1])
        if x.ndim == 2 and x.shape[0] == reading.batch * reading.length:
            return x.view(reading.batch, reading.length, -1)
        if x.ndim != 3 or x.shape[:2] != (reading.batch, reading.length):
            raise OptionError(
                f"{self.slot or type(self).__name__} reads texts, {reading.batch} of {reading.length} tokens here, and "
                f"is given {list(x.shape)}: it needs all their tokens, in no chunks, pooled or routed by no family"
            )
        return x
