"""Comparing two models' outputs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.checkpoint.loading import load_model
from hf_glu.config.traits import vocabulary
from hf_glu.errors import OptionError
from hf_glu.instruments.probe import max_abs_difference, probe_inputs, try_run, with_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Exact conversions of real models measured 2e-6 to 3e-6: GEMMs of another shape add in another order.
TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The differences between two models' outputs.

    Attributes:
        differences: max |a - b| of each output.
        tolerance: what counts as the same.
        parameters: number of parameters of each.
    """

    differences: dict[str, float]
    tolerance: float
    parameters: tuple[int, int]

    @property
    def max_abs_difference(self) -> float:
        """The largest difference of any output."""
        return max(self.differences.values())

    @property
    def same(self) -> bool:
        """Whether no output differs by more than the tolerance (NaN does)."""
        return all(difference <= self.tolerance for difference in self.differences.values())

    def to_dict(self) -> JsonObject:
        """Return the result as plain data."""
        return {
            "same": self.same,
            "max_abs_difference": self.max_abs_difference,
            "differences": self.differences,
            "tolerance": self.tolerance,
            "parameters": list(self.parameters),
        }


def verify(
    a: str | os.PathLike[str] | PreTrainedModel,
    b: str | os.PathLike[str] | PreTrainedModel,
    *,
    inputs: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
) -> Verification:
    """Run two models on the same inputs, in float32, and compare their outputs (logits, hidden states).

    Args:
        a, b: models, local folders or Hub ids.
        inputs: keyword arguments of their forwards; None: random token ids.
        tolerance: what counts as the same.

    Raises:
        CheckpointError: a checkpoint can't be loaded.
        OptionError: the models have outputs of different kinds or shapes.
    """
    if not tolerance >= 0:
        raise OptionError(f"the tolerance must be at least 0, got {tolerance}")
    first, second = (_model(model) for model in (a, b))
    sizes = [vocabulary(model.config) for model in (first, second)]
    if inputs is None and None not in sizes and sizes[0] != sizes[1]:
        raise OptionError(f"the models have {sizes[0]:,} and {sizes[1]:,} tokens: they don't read the same ids")
    given = probe_inputs(first) if inputs is None else with_decoder(first, inputs)
    results = [try_run(model, {key: _to(model, value) for key, value in given.items()}) for model in (first, second)]
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (first, second)]
    return Verification(
        differences=max_abs_difference(*results), tolerance=tolerance, parameters=(counts[0], counts[1])
    )


def _model(model: str | os.PathLike[str] | PreTrainedModel) -> PreTrainedModel:
    if isinstance(model, (str, os.PathLike)):
        return load_model(model, dtype=torch.float32)
    return model


def _to(model: PreTrainedModel, value: Any) -> Any:
    return value.to(next(model.parameters()).device) if isinstance(value, torch.Tensor) else value
