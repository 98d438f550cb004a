"""A penalty that keeps gates about as open as they were when training began."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from hf_glu.activation.module import GatedActivation
from hf_glu.errors import NoSiteError, OptionError, TrainingError
from hf_glu.ffn.sites import find_sites
from hf_glu.instruments.hooks import hook_after
from hf_glu.instruments.recorder import Call, Watch, watching

Output = TypeVar("Output")


class Homeostasis:
    """The penalty of one model's gates: weight * mean over FFNs and channels of (openness - openness at first)^2.

    A channel's openness is the mean of sigmoid(g) over the tokens of a batch that are no padding.

    Attributes:
        targets: openness of each FFN's channels in the first batch, ``[W]``.
    """

    def __init__(self, weight: float) -> None:
        if not weight >= 0:
            raise OptionError(f"the weight of the homeostatic penalty must be at least 0, got {weight}")
        self.weight = weight
        self.targets: dict[str, Tensor] = {}
        self._found: list[Tensor] = []

    def see(self, name: str, act: nn.Module, call: Call) -> None:
        """Note the openness of the gate called ``name``, which ``act`` is given."""
        if not act.training:
            return
        x = call.tokens.rows(call.x)
        if not len(x):  # nothing but padding
            return
        gate = x.chunk(2, dim=-1)[0] if isinstance(act, GatedActivation) else x
        openness = gate.sigmoid().float().mean(0)
        target = self.targets.setdefault(name, openness.detach())
        moved = (openness - target).square().mean()
        if not call.repeated:  # else it was noted in the forward pass
            self._found.append(moved)

    def add(self, model: nn.Module, args: object, output: Output) -> Output:
        """Add the penalty to the loss that the model returns: a forward hook of the model."""
        found, self._found = self._found, []
        loss = getattr(output, "loss", None)
        if loss is None or not found or not loss.requires_grad:
            return output
        penalty = torch.stack(found).mean()
        if not penalty.requires_grad:
            raise TrainingError("the homeostatic penalty has no gradient: use gradient checkpointing without reentry")
        output.loss = loss + self.weight * penalty.to(loss.dtype)  # type: ignore[attr-defined]
        return output


@contextmanager
def homeostasis(model: nn.Module, weight: float) -> Iterator[Homeostasis]:
    """Add to the model's loss, inside of the block, a penalty on gates that move from their first openness.

    Args:
        model: with gated FFNs, converted or native; its forward returns the loss.
        weight: of the penalty.

    Raises:
        NoSiteError: the model has no gate.
        OptionError: a negative weight.
    """
    penalty = Homeostasis(weight)
    sites = [site for site in find_sites(model) if site.kind != "experts" and (site.native or site.activation)]
    if not sites:
        raise NoSiteError(f"{type(model).__name__} has no gate: hf_glu.convert(model, 'swiglu') gives it some")
    watches = [Watch(module=site.act, see=partial(penalty.see, site.name, site.act), repeated=True) for site in sites]
    with watching(model, watches):
        handle = hook_after(model, penalty.add)
        try:
            yield penalty
        finally:
            handle.remove()
