"""A detector: on which side of a contrast a text is, by the gates of one layer.

    score = w . g + b,   w_c = (m+_c - m-_c) / s_c^2,   b = - w . (m+ + m-) / 2

a linear discriminant with a diagonal covariance, m and s being means and deviations of the texts' mean pre-activations.

Shapes: N rows, W channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIDES = ("positive", "negative")


@dataclass(frozen=True, kw_only=True, eq=False)
class Detector:
    """A linear detector on one gate's pre-activation.

    Attributes:
        place: the gate's name.
        weight: w, ``[W]``.
        bias: b.
        accuracy: on texts that it wasn't fitted on, by their means; None: there were too few.
    """

    place: str
    weight: Tensor
    bias: float
    accuracy: float | None = None

    def score(self, g: Tensor) -> Tensor:
        """Return w . g + b of pre-activations ``[..., W]``: ``[...]``, float32; positive on the positive side."""
        return g.float() @ self.weight.to(g.device) + self.bias

    def says(self, side: str, g: Tensor) -> Tensor:
        """Return where it says ``positive`` or ``negative``: ``[...]``, of ``[..., W]``."""
        score = self.score(g)
        return score > 0 if side == SIDES[0] else score <= 0


def fit_detector(place: str, means: Tensor, variance: Tensor, accuracy: float | None = None) -> Detector:
    """Return the detector of two classes with ``means`` ``[2, W]`` (positive first) and a ``variance`` ``[W]``."""
    floor = variance.mean() * 1e-3 + torch.finfo(torch.float32).tiny
    weight = (means[0] - means[1]) / (variance + floor)
    return Detector(place=place, weight=weight, bias=-float(weight @ means.mean(0)), accuracy=accuracy)
