"""Fitting a modulation of gates to two kinds of text.

At strength 1 each gate is moved by what tells the classes apart: slope (g - threshold) with, for the difference d of
their means, their mean m and the log l of the ratio of their deviations,

    threshold = l m - d,   log slope = l   (0, where slopes aren't asked for)

so that, to first order in the strength, gates turn about m and move by d.

Shapes: W channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from hf_glu.errors import OptionError, UnknownNameError, nearest
from hf_glu.instruments.pre_activations import watch_gate
from hf_glu.instruments.steering import METHODS
from hf_glu.instruments.steering.contrast import BATCH, read_contrast
from hf_glu.instruments.steering.directions import Direction, best_place, find_directions
from hf_glu.instruments.steering.learning import learn
from hf_glu.instruments.steering.modulating import GateSteering
from hf_glu.instruments.steering.places import gate_places, sample

STEPS = 12


def fit_gates(
    model: nn.Module, tokenizer: Any, positive: Sequence[str], negative: Sequence[str], *, method: str = "diffmean",
    layers: Any = None, slopes: bool = False, batch_size: int = BATCH, max_length: int | None = None,
    steps: int = STEPS, seed: int = 0,
) -> GateSteering:  # fmt: skip
    """Fit thresholds (and slopes) of the gates of ``model``: what `hf_glu.fit_modulation` does.

    Raises:
        UnknownNameError, OptionError, DataError, NoSiteError, MissingPackageError: see there.
    """
    if method not in METHODS:
        raise UnknownNameError(f"unknown method {method!r}; {nearest(method, METHODS)}")
    if batch_size < 1 or steps < 1:
        raise OptionError(f"batch_size and steps are at least 1, got {batch_size} and {steps}")
    sites = gate_places(model, layers)
    contrast = read_contrast(model, tokenizer, positive, negative, max_length=max_length)
    places = {name: partial(watch_gate, site) for name, site in sites.items()}
    start = "diffmean" if method == "learned" else method
    found = find_directions(model, contrast, places, method=start, slopes=slopes, batch_size=batch_size)
    made = GateSteering(
        thresholds={name: _threshold(direction) for name, direction in found.items()},
        log_slopes={name: each.log_slope for name, each in found.items() if each.log_slope is not None},
        samples={name: sample(sites[name]) for name in found},
        model=type(model).__name__,
        method=method,
        accuracy={name: each.detector.accuracy for name, each in found.items() if each.detector.accuracy is not None},
        detector=found[best_place(found)].detector,
    )
    if method != "learned":
        return made
    scales = {name: direction.deviation for name, direction in found.items()}
    return learn(model, tokenizer, contrast, made, scales, steps=steps, batch_size=batch_size, seed=seed)


def _threshold(direction: Direction) -> Tensor:
    if direction.log_slope is None:
        return -direction.difference
    return direction.log_slope * direction.means.mean(0) - direction.difference
