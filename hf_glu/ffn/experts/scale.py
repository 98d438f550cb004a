"""How a router's loss reaches its gradient: injected where its FFN's output gets its own, as the main loss weighs it.

Each expert FFN injects the gradient of its loss where its output's gradient passes (`inject`), times the gradient that
the sum of main loss and routers' losses got (`AddToLoss`): right under checkpointing, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_glu.compat.of_torch import GRAPH_TASK
from hf_glu.errors import TrainingError

ADD = "add the routers' losses to it: loss = hf_glu.with_router_losses(loss, model)"


class Scale:
    """What a router's loss is multiplied by in the backward pass.

    Attributes:
        default: the weight beside a loss that nobody has added them to; None: 1, unless that is known to be wrong.
        value: the gradient of the loss that they were added to; None: there is none (yet).
        alone: whether they were injected beside such a loss, and the gradients haven't been cleared since.
    """

    def __init__(self) -> None:
        self.default: float | None = None
        self.value: Tensor | float | None = None
        self.alone = False
        self._of: tuple[int, int] | None = None

    def receive(self, value: Tensor, of: tuple[int, int]) -> None:
        """Take the gradient of a loss, and of another that the same loss ``of`` a pass was added to in one backward."""
        self.value = value if self.value is None or of != self._of else self.value + value
        self._of = of

    def weigh(self, *, scaled: bool) -> Tensor | float:
        """Return the weight; ``scaled``: whether the loss is one that is scaled.

        Raises:
            TrainingError: it can't be known.
        """
        if self.value is not None:
            return self.value
        if self.default is not None:
            return self.default
        if scaled:
            raise TrainingError(f"the loss is computed outside of a model in float16, where it is scaled: {ADD}")
        self.alone = True
        return 1.0


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, loss: Tensor, scale: Scale, loads: Tensor | None, total: Tensor | None
    ) -> Tensor:
        kind = output.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else output.dtype
        ctx.scaled = dtype == torch.float16
        ctx.scale, ctx.like, ctx.loads, ctx.total = scale, loss, loads, total
        return output.clone()  # no view: Falcon adds to it in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        if ctx.loads is not None:
            ctx.total += ctx.loads
        return gradients[0], torch.ones_like(ctx.like) * ctx.scale.weigh(scaled=ctx.scaled), None, None, None


@torch.compiler.disable  # a compiled backward pass would keep the scale of its first step
def inject(
    output: Tensor, loss: Tensor, scale: Scale, loads: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """Return ``output``; in the backward pass ``loss`` gets the gradient ``scale`` says, ``loads`` go to ``total``.

    A layer that checkpointing computes twice has one backward pass: what is counted there is counted once.
    """
    return _Inject.apply(output, loss, scale, loads, total)


class AddToLoss(torch.autograd.Function):
    """Adds routers' losses to a loss in value, and tells their scales what gradient it gets."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, share: Tensor | float, scales: list[Scale], losses: list[Tensor]) -> Tensor:
        ctx.share, ctx.scales, ctx.router_losses = share, scales, losses
        extra = torch.stack([each.to(loss.device) for each in losses]).sum()
        return loss + (share * extra).to(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        summed = gradients[0].detach().sum()
        summed = summed.to(torch.promote_types(summed.dtype, torch.float32))
        task = GRAPH_TASK.find()()
        for scale, added in zip(ctx.scales, ctx.router_losses, strict=True):
            scale.receive(summed * ctx.share, (task, id(added)))
        return gradients[0], None, None, None
