"""What changes are given, and give back, besides rows: data to work on, and rules for stored tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_glu.conversion.fit.calibration import MAX_TOKENS, Batches, inputs_at, reached
from hf_glu.ffn.forward import is_alone
from hf_glu.ffn.sites import Site

SEED = 0
PASSES = 4  # how often about a deep model is run on all calibration data
HELD = 2**29  # numbers of them that are kept at a time


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """How the stored weight and bias of a linear map become those after a change, without a model.

    Attributes:
        path: of the map in the model.
        make: (tensor, whether it is the bias, dimension of the outputs) -> the new tensor.
        transposed: whether the weight is stored as ``[in, out]``.
        times: how many times as many outputs there are afterwards.
        adds_bias: whether a map without a bias gets one.
    """

    path: str
    make: Callable[[Tensor, bool, int], Tensor]
    transposed: bool
    times: int = 1
    adds_bias: bool = False

    @classmethod
    def of(cls, site: Site, make: Callable[[Tensor, bool, int], Tensor], **more: Any) -> TensorRule:
        """Return the rule for the in-projection of a site."""
        return cls(path=site.parts[-2], make=make, transposed=isinstance(site.in_proj, Conv1D), **more)


@dataclass(kw_only=True, eq=False)
class Work:
    """What a change is given besides its row, while a plan is carried out.

    Attributes:
        model: the model.
        batches: calibration data; None: none were given.
        distill_steps: of fits; None: as many as each needs.
        generator: of random numbers, the same for all rows.
        curves: where a change leaves the error of a site by its number of active experts.
        utilities: by site, how much each of its experts is worth ``[E]``, where a change has asked for it.
        sites: all that are converted by the running stage, in order.
    """

    model: Any
    batches: Batches | None = None
    distill_steps: int | None = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(SEED))
    curves: dict[str, list[float]] = field(default_factory=dict)
    utilities: dict[str, Tensor] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    _ahead: dict[str, Tensor | None] = field(default_factory=dict)

    def begin(self, sites: list[Site]) -> None:
        """Begin a stage: what sites were given in the one before, they aren't any more."""
        self.sites, self._ahead = sites, {}

    def inputs_ahead(self, site: Site) -> Tensor:
        """Return what a site is given, as `site_inputs`; the passes serve the next sites, too.

        So a model of 30 layers is run 5 times, not 30; what these few are given is without each other's conversion.

        Raises:
            OptionError: the model never runs the site on the calibration data.
        """
        if site.name not in self._ahead:
            alone = [each for each in self.sites if is_alone(each)]
            begin = [each.name for each in alone].index(site.name)
            count = max(1, min(len(alone) // PASSES, HELD // (MAX_TOKENS * site.hidden)))
            coming = alone[begin : begin + count]
            found = inputs_at(self.model, coming, self.batches or [])
            self._ahead = {each.name: inputs for each, inputs in zip(coming, found, strict=True)}
        return reached(site, self._ahead.pop(site.name))
