"""Statistics of a trained model's activations and experts on some of its validation data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

from torch import nn

from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.instruments.activity import activation_statistics, expert_loads
from hf_glu.instruments.adaptive import adaptive_statistics
from hf_glu.tasks.checking import LABEL
from hf_glu.training.data.features import Features, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SOURCE = "source"  # the column that says where a text comes from
MOST_TYPES = 8  # where data name more sources than this, texts are told apart by class
BATCHES = 8


class ValidationStatistics(TypedDict):
    """Statistics of activations, of those with parameters of their own, and of experts; a row for each layer."""

    activations: list[JsonObject]
    adaptive: list[JsonObject]
    experts: list[JsonObject]


def text_types(features: Features, inputs: Sequence[int]) -> list[str] | None:
    """Return the type of each input's text: its source, if the data name a few, else its class.

    None where they have neither, as in a regression.
    """
    raw, rows = features.raw, [features.owners[number] for number in inputs]
    if features.task.form == "text":  # whose source is its text
        return None
    if SOURCE in raw.column_names and 1 < len(set(raw[SOURCE])) <= MOST_TYPES:
        return [str(source) for source in raw.select(rows)[SOURCE]]
    if features.task.form != "classes" or LABEL not in raw.column_names:
        return None
    return [features.task.labels[label] for label in raw.select(rows)[LABEL]]


def validation_statistics(
    model: PreTrainedModel,
    features: Features,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    before: Mapping[str, nn.Module],
) -> ValidationStatistics:
    """Measure a model's activations and experts on at most `BATCHES` batches.

    The rows are spread over all of the data, which may be sorted by class.

    Args:
        model: trained.
        features: labelled data.
        tokenizer: the model's.
        batch_size: of the forward passes.
        before: its adaptive activations before the training, see `hf_glu.instruments.adaptive.snapshot`.
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
