"""A modulation of a model's gates as a thing: put on and taken off, added and scaled, folded into weights.

    y = N(slope (g - threshold)) [* u],   threshold = strength t,   slope = exp(strength l)

t and l are of each layer and channel. Both are linear in the strength, so that modulations are vectors:
``0.8 * a - b``.

Shapes: W channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_glu.config.showing import Shown, ShownTable, number
from hf_glu.errors import OptionError, UnknownNameError, nearest, shown
from hf_glu.instruments.steering.attached import Attached, GateShift
from hf_glu.instruments.steering.detecting import SIDES, Detector
from hf_glu.instruments.steering.folding import fold_gates
from hf_glu.instruments.steering.places import check_model, gate_places, same_weights
from hf_glu.instruments.steering.scope import Chosen, Scope, Strength

Same = TypeVar("Same", bound="GateSteering")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GateSteering(Shown):
    """Thresholds and slopes of a model's gates.

    Attributes:
        thresholds: t by the gates' names (``layers.3``), each ``[W]``, float32.
        log_slopes: l; gates that aren't in it have slope 1.
        samples: a few of each gate's weights, by which the model is known again.
        model: the class of the model that it is of.
        method: how it was fitted; of sums, how it was made.
        accuracy: how well each gate tells the two classes apart, on texts that it wasn't fitted on.
        detector: of the same contrast; None: there is none.
    """

    thresholds: Mapping[str, Tensor]
    log_slopes: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Mapping[str, Tensor] = field(default_factory=dict)
    model: str = "an unknown model"
    method: str = "by hand"
    accuracy: Mapping[str, float] = field(default_factory=dict)
    detector: Detector | None = None

    @contextmanager
    def on(
        self, model: nn.Module, strength: Strength = 1.0, *, tokens: Chosen = "all", when: str | None = None,
        check: bool = True,
    ) -> Iterator[None]:  # fmt: skip
        """Steer ``model`` within the block, in this thread: others may steer it otherwise meanwhile, or not at all.

        Arguments and errors are those of `attach`. A backward pass belongs into the block, too.
        """
        attached = self._attach(model, strength, tokens, when, check, bound=True)
        try:
            yield
        finally:
            attached.detach()

    def attach(
        self, model: nn.Module, strength: Strength = 1.0, *, tokens: Chosen = "all", when: str | None = None,
        check: bool = True,
    ) -> Attached:  # fmt: skip
        """Steer ``model``, in whatever thread it runs, until ``.detach()`` of what is returned is called.

        A copy of the model that is made meanwhile, or a pickle, is as the model is without.

        Args:
            model: the model that it was fitted on, whatever its head, precision or wrapper, converted or not.
            strength: a number, or one for each sequence of the batch (for each text, where beams are searched).
            tokens: ``all``; ``generated``, those of ``model.generate`` that come after its prompt; ``last``, of each
                pass; or a mask of positions ``[batch, tokens]`` of the text that is read, which what is generated after
                it isn't in, nor what a decoder beside an encoder is given.
            when: ``positive`` or ``negative``: only at tokens at which the detector says so, by their own gates; gates
                before the detector's layer, and those of another stack, aren't steered then.
            check: whether to refuse a model with other weights.

        Raises:
            OptionError, UnknownNameError: another model, a strength or tokens that can't be, or no detector.
        """
        return self._attach(model, strength, tokens, when, check, bound=False)

    def _attach(
        self, model: nn.Module, strength: Strength, tokens: Chosen, when: str | None, check: bool, *, bound: bool
    ) -> Attached:
        scope = Scope.read(strength, tokens)
        if when is not None and when not in SIDES:
            raise UnknownNameError(f"unknown when={when!r}; {nearest(when, SIDES)}")
        if when is not None and self.detector is None:
            raise OptionError(f"when={when!r} needs a detector, which a sum of modulations of several contrasts hasn't")
        self.check(model, weights=check)
        sites = {name: site for name, site in gate_places(model).items() if name in self.thresholds}
        shifts = {name: GateShift(self.thresholds[name], self.log_slopes.get(name)) for name in self.thresholds}
        return Attached(model, sites, shifts, scope, detector=self.detector, when=when, bound=bound)

    def check(self, model: nn.Module, *, weights: bool = True) -> None:
        """Check that ``model`` is the one that it is of.

        Args:
            model: the model.
            weights: whether its weights have to be the same, too; else its gates have to.

        Raises:
            OptionError: it isn't.
        """
        widths = {name: len(threshold) for name, threshold in self.thresholds.items()}
        check_model(model, widths, self.samples if weights else {}, of=self.model)

    def fold(self, model: nn.Module, strength: float = 1.0, *, check: bool = True) -> None:
        """Put it into the weights of ``model``, which computes the same from then on, anywhere, without hf_glu.

        The threshold goes into the in-projection's bias, the slope into the rows that make the gate:
        ``slope (W x + b - threshold) = (slope W) x + slope (b - threshold)``. This is exact for every activation; what
        is left are roundings. Where there is no bias, the family's config has to allow one (Llama's ``mlp_bias``): all
        that the entry stands for then gets biases, of 0.

        Args:
            model: the model that it is of.
            strength: one number.
            check: whether to refuse a model with other weights, and to compare the outputs.

        Raises:
            OptionError: another model, or a strength that can't be.
            ConversionError: a gate without a bias in a family without one, or the outputs differ. Nothing is changed.
        """
        scope = Scope.read(strength, "all")
        if not isinstance(scope.strength, float):
            raise OptionError(f"a modulation is folded at one strength, got {shown(strength)}")
        self.check(model, weights=check)
        shifts = {name: GateShift(self.thresholds[name], self.log_slopes.get(name)) for name in self.thresholds}
        compared = self.on(model, scope.strength, check=False) if check else None
        fold_gates(model, shifts, scope.strength, compared=compared)

    def __mul__(self: Same, factor: object) -> Same:
        """Return it at ``factor`` times its strength.

        Raises:
            OptionError: the factor isn't finite.
        """
        times = _number(factor)
        if times is None:
            return NotImplemented
        if not abs(times) <= torch.finfo(torch.float32).max:
            raise OptionError(f"a modulation is multiplied by a finite number, got {times}")
        return replace(
            self,
            thresholds={name: value * times for name, value in self.thresholds.items()},
            log_slopes={name: value * times for name, value in self.log_slopes.items()},
            method=f"{times:g} * ({self.method})",
        )

    __rmul__ = __mul__

    def __neg__(self: Same) -> Same:
        """Return its opposite."""
        return self * -1

    def __truediv__(self: Same, divisor: object) -> Same:
        """Return it at its strength divided by ``divisor``.

        Raises:
            OptionError: the divisor is 0 or isn't finite.
        """
        parts = _number(divisor)
        if parts is None:
            return NotImplemented
        if not 0 < abs(parts) < inf:
            raise OptionError(f"a modulation is divided by a finite number other than 0, got {parts}")
        return self * (1 / parts)

    def __add__(self: Same, other: GateSteering) -> Same:
        """Return the sum of two modulations of one model, gate by gate; one that lacks a gate leaves it to the other.

        Raises:
            OptionError: they are of different models.
        """
        if not isinstance(other, GateSteering):
            return NotImplemented
        for name in set(self.thresholds) & set(other.thresholds):
            widths = len(self.thresholds[name]), len(other.thresholds[name])
            samples = [each.samples[name] for each in (self, other) if name in each.samples]
            if widths[0] != widths[1] or (len(samples) == 2 and not same_weights(*samples)):
                raise OptionError(f"modulations of different models, {self.model} and {other.model}, have no sum")
        return replace(
            self,
            thresholds=_sum(self.thresholds, other.thresholds),
            log_slopes=_sum(self.log_slopes, other.log_slopes),
            samples={**other.samples, **self.samples},
            method=f"{self.method} + {other.method}",
            accuracy={},
            detector=self.detector if self.detector is other.detector else None,
        )

    def __radd__(self: Same, other: int) -> Same:
        """Return it where ``other`` is the 0 that ``sum`` begins with."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self: Same, other: GateSteering) -> Same:
        """Return the difference of two modulations of one model, gate by gate."""
        return self + -other if isinstance(other, GateSteering) else NotImplemented

    def to_dict(self) -> dict[str, Any]:
        """Return what there is to say of it as plain data, without its numbers."""
        rows = [
            {
                "gate": name,
                "width": len(threshold),
                "threshold": float(threshold.square().mean().sqrt()),
                "slope": float(self.log_slopes[name].mean().exp()) if name in self.log_slopes else 1.0,
                "accuracy": self.accuracy.get(name),
            }
            for name, threshold in self.thresholds.items()
        ]
        detector = {"gate": self.detector.place, "accuracy": self.detector.accuracy} if self.detector else None
        return {"model": self.model, "method": self.method, "detector": detector, "rows": rows}

    def _table(self) -> ShownTable:
        columns = ("gate", "#width", "#threshold, rms", "#slope, mean", "#accuracy, held out")
        rows = [
            (row["gate"], str(row["width"]), number(row["threshold"], ".3g"), number(row["slope"], ".3f"),
             number(row["accuracy"], ".1%"))
            for row in self.to_dict()["rows"]
        ]  # fmt: skip
        return ShownTable(title=f"{self.method}, of {self.model}", columns=columns, rows=rows)


def _number(given: object) -> float | None:
    if isinstance(given, Tensor) and given.ndim == 0:
        given = given.item()
    return None if isinstance(given, bool) or not isinstance(given, Real) else float(given)


def _sum(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(one)
    for name, value in other.items():
        found[name] = found[name] + value if name in found else value
    return found
