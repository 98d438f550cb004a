"""Which parameters get weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_glu.activation import OwnedActivation
from hf_glu.training.gates import masked_parameters
from hf_glu.training.parts import is_norm


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups: weight decay for matrices, none for vectors, norms and our scalars.

    The bias of an up projection is 1 after a conversion, and decay would pull each FFN towards zero; the scalars and
    per-channel parameters of an activation have their own neutral values, which aren't 0 either. Projections of which
    `hf_glu.training.gates.train_only_gates` trains a half are in a third group, without decay: it would shrink the
    frozen half.

    Args:
        model: any model; parameters without gradient are left out, shared ones are in once.
        lr: learning rate.
        weight_decay: for the first group.

    Returns:
        Groups as `torch.optim` takes them, with a ``name`` each; for a Trainer:
        ``Trainer(..., optimizers=(AdamW(parameter_groups(model, 2e-5, 0.01)), None))``.
    """
    undecayed = {id(p) for module in model.modules() if _spared(module) for p in module.parameters()}
    masked = masked_parameters(model)
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "masked": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and id(parameter) not in undecayed
            groups["masked" if id(parameter) in masked else "decay" if decays else "no_decay"].append(parameter)
    return [
        {"name": name, "params": members, "lr": lr, "weight_decay": weight_decay if name == "decay" else 0.0}
        for name, members in groups.items()
        if members
    ]


def _spared(module: nn.Module) -> bool:
    return isinstance(module, OwnedActivation) or is_norm(module)
