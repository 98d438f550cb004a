"""The routers' losses, for any head, loop and Trainer.

Each expert FFN injects the gradient of its loss where its output's gradient passes (`inject`). How much of it is
decided by the model's own loss, where it returns one: `add_to_loss` adds the losses' values to it and passes its
gradient on as the scale, so that gradient accumulation and loss scaling treat both alike, under checkpointing, too. A
model that returns no loss injects with a scale of 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.finding import find, forget


class Scale:
    """What the routers' losses are multiplied by in the backward pass."""

    def __init__(self) -> None:
        self.default = 1.0
        self.value: Tensor | float = self.default


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, loss: Tensor, scale: Scale, loads: Tensor | None, total: Tensor | None
    ) -> Tensor:
        ctx.scale, ctx.like, ctx.loads, ctx.total = scale, loss, loads, total
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        if ctx.loads is not None:
            ctx.total += ctx.loads
        return gradients[0], torch.ones_like(ctx.like) * ctx.scale.value, None, None, None


@torch.compiler.disable  # a compiled backward pass would keep the scale of its first step
def inject(
    output: Tensor, loss: Tensor, scale: Scale, loads: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """Return ``output``; in the backward pass ``loss`` gets the gradient ``scale.value``, ``loads`` go to ``total``.

    A layer that checkpointing computes twice has one backward pass: what is counted there is counted once.
    """
    return _Inject.apply(output, loss, scale, loads, total)


class _AddToLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, extra: Tensor, scales: list[Scale]) -> Tensor:
        ctx.scales = scales
        return loss + extra.to(loss.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        for scale in ctx.scales:
            scale.value = gradients[0].detach().sum().float()
        return gradients[0], None, None


def add_to_loss(loss: Tensor, extra: Tensor, scales: list[Scale]) -> Tensor:
    """Return ``loss + extra``; in the backward pass the gradient of the loss becomes the scale of what was injected."""
    return _AddToLoss.apply(loss, extra.detach(), scales)


def watch(model: nn.Module) -> None:
    """Let ``model`` add its routers' losses to the loss that it returns; does nothing the second time."""
    forget(model)
    if add_router_losses not in model._forward_hooks.values():
        model.register_forward_pre_hook(reset_losses)
        model.register_forward_hook(add_router_losses)
    # each process counts for itself until the routers add up
    loads = {f"{name}.load" for name, module in model.named_modules() if getattr(module, "load", None) is not None}
    if loads:
        ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
        model._ddp_params_and_buffers_to_ignore = sorted({*ignored, *loads})  # type: ignore[assignment]


def injects(module: nn.Module) -> bool:
    """Tell whether a module injects a loss: it has a `Scale`."""
    return isinstance(module.__dict__.get("scale"), Scale)


def _experts(model: nn.Module) -> list[Any]:
    return find(model, injects)


def reset_losses(model: nn.Module, args: Any) -> None:
    """Forget the last step's losses and scales before a forward pass (not where checkpointing repeats a layer)."""
    for experts in _experts(model):
        experts.loss, experts.scale.value = None, experts.scale.default
        if model.training:
            experts.router.rebalance()


@torch.compiler.disable
def add_router_losses(model: nn.Module, args: Any, output: Any) -> Any:
    """Add the routers' losses to ``output.loss``, where there is one to train."""
    loss = getattr(output, "loss", None)
    found = [experts for experts in _experts(model) if experts.loss is not None]
    if loss is None or not found or not loss.requires_grad:
        return output
    extra = torch.stack([experts.loss.to(loss.device) for experts in found]).sum()
    output.loss = add_to_loss(loss, extra, [experts.scale for experts in found])
    for experts in found:
        experts.loss = None  # a model around this one must not add it again
    return output
