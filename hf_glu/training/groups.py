"""Which parameters get weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_glu.activation import OwnedModule


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups: weight decay for matrices, none for vectors, norms and our scalars.

    The bias of an up projection is 1 after a conversion, and decay would pull each FFN towards zero; the scalars and
    per-channel parameters of an activation have their own neutral values, which aren't 0 either.

    Args:
        model: any model; parameters without gradient are left out, shared ones are in once.
        lr: learning rate.
        weight_decay: for the first group.

    Returns:
        Groups as `torch.optim` takes them, with a ``name`` each; for a Trainer:
        ``Trainer(..., optimizers=(AdamW(parameter_groups(model, 2e-5, 0.01)), None))``.
    """
    undecayed = {id(p) for module in model.modules() if _spared(module) for p in module.parameters()}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.ndim >= 2 and id(parameter) not in undecayed].append(parameter)
    settings = ((True, "decay", weight_decay), (False, "no_decay", 0.0))
    return [
        {"name": name, "params": groups[key], "lr": lr, "weight_decay": decay}
        for key, name, decay in settings
        if groups[key]
    ]


def _spared(module: nn.Module) -> bool:
    return isinstance(module, OwnedModule) or "norm" in type(module).__name__.lower()
