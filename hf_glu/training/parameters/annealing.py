"""Annealing learnable activations to their target while fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import TrainerCallback

from hf_glu.activation.learnable import mixes
from hf_glu.errors import NoSiteError, OptionError

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


def anneal(model: nn.Module, progress: float, *, until: float = 0.5) -> float:
    """Set how far the learnable mixes of ``model`` are annealed: t = progress / until, at most 1.

    A pure function of progress: called at each step of a loop, it is right after a resume in the middle, too. From
    ``until`` on the activations are purely the target, and `hf_glu.freeze_mix` folds them.

    Args:
        model: with learnable activations (wrapped models, too).
        progress: share of the training that is done, 0 to 1.
        until: share of the training at which the mix becomes pure.

    Returns:
        t.

    Raises:
        NoSiteError: the model has no learnable activation.
        OptionError: a share that is none.
    """
    if not 0 <= progress <= 1:
        raise OptionError(f"progress must be between 0 and 1, got {progress}")
    if not 0 < until <= 1:
        raise OptionError(f"until must be more than 0 and at most 1, got {until}")
    found = mixes(model)
    if not found:
        raise NoSiteError(f"{type(model).__name__} has no learnable activation to anneal")
    annealed = min(1.0, progress / until)
    with torch.no_grad():
        for mix in found:
            mix.annealed.fill_(annealed)
    return annealed


class AnnealCallback(TrainerCallback):
    """A Trainer callback that calls `anneal` at each step: ``Trainer(..., callbacks=[AnnealCallback(until=0.5)])``."""

    def __init__(self, until: float = 0.5) -> None:
        self.until = until

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Anneal for the step that begins."""
        anneal(model, min(1.0, state.global_step / max(1, state.max_steps)), until=self.until)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Anneal for the progress at the end, so that a whole training ends with pure mixes.

        The best checkpoint, where the Trainer has loaded it, stays what it was when it was the best.
        """
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            return
        anneal(model, min(1.0, state.global_step / max(1, state.max_steps)), until=self.until)
