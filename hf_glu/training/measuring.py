"""What a trained model does on some of its validation data: its activations, and its experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_glu.training.adaptive import adaptive_statistics, text_types
from hf_glu.training.features import Features, collate
from hf_glu.training.statistics import activation_statistics, expert_loads

BATCHES = 8


def validation_statistics(
    model: Any, features: Features, tokenizer: Any, batch_size: int, before: Mapping[str, nn.Module]
) -> dict[str, list[dict[str, Any]]]:
    """Return what a model's results say of its activations and experts, on at most `BATCHES` batches.

    The rows are spread over all of the data, which may be sorted by class.

    Args:
        model: trained.
        features: labelled data.
        tokenizer: the model's.
        batch_size: of the forward passes.
        before: its adaptive activations before the training, see `hf_glu.training.adaptive.snapshot`.
    """
    count = min(len(features.data), BATCHES * batch_size)
    rows = [number * len(features.data) // count for number in range(count)]
    device = next(model.parameters()).device
    inputs = [collate(features, tokenizer, rows[at : at + batch_size], device) for at in range(0, count, batch_size)]
    for batch in [] if features.text else inputs:
        del batch["labels"]
    return {
        "activations": activation_statistics(model, inputs),
        "adaptive": adaptive_statistics(model, inputs, before, text_types(features, rows)),
        "experts": expert_loads(model, inputs),
    }
