"""Metrics as `evaluate.Metric` modules that need no network."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from hf_glu.errors import DataError


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference: ``{"accuracy": float}``."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=str(self.__doc__), citation="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, expected = np.asarray(predictions), np.asarray(references)
        if predicted.size == 0:
            raise DataError("there are no predictions to compute a metric of")
        return {"accuracy": float((predicted == expected).mean())}
