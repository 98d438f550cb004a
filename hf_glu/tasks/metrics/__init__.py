"""The metrics of GLUE and SuperGLUE, by name, without the network.

`scores` has the pure functions, `modules` the `evaluate.Metric` classes, which are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_glu.config.extras import OF_TRAINING, need
from hf_glu.errors import UnknownNameError, nearest

if TYPE_CHECKING:
    from hf_glu.tasks.metrics.modules import METRICS as METRICS

__all__ = ["METRICS", "compute"]


def compute(name: str, predictions: object, references: object) -> dict[str, float]:
    """Compute the metric ``name``: fractions in 0..1, correlations in -1..1.

    Args:
        name: key of `METRICS`.
        predictions, references: parallel; the class in `METRICS` says which form they have.

    Raises:
        MissingPackageError: the extra that computes it isn't installed.
        UnknownNameError: no such metric.
        DataError: predictions or references that can't be scored.
    """
    metrics = _modules()
    if name not in metrics:
        raise UnknownNameError(f"unknown metric {name!r}; {nearest(name, metrics)}")
    found: dict[str, float] = metrics[name]().compute(predictions=predictions, references=references)
    return found


def _modules() -> dict[str, Any]:
    """Import the classes."""
    need(*OF_TRAINING, what="hf_glu.metrics")
    from hf_glu.tasks.metrics.modules import METRICS

    return METRICS


def __getattr__(name: str) -> object:
    if name == "METRICS":  # importing `evaluate` takes seconds
        return _modules()
    raise AttributeError(f"module 'hf_glu.tasks.metrics' has no attribute {name!r}")
