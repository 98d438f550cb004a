"""An optimizer's parameter groups: what gets weight decay, and what a learning rate of its own."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from hf_glu.activation.moa import TokenMix
from hf_glu.activation.modulated import ContextSource
from hf_glu.activation.module import OwnedActivation
from hf_glu.training.parameters.gates import masked_parameters
from hf_glu.training.parameters.parts import is_norm

RATES = frozenset({"A_log", "D"})  # Mamba's, which ask for no decay
OWN = (OwnedActivation, ContextSource)
# matrices over all channels or hidden units: a step changes what they give by the sum of as many changes
WIDE: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (TokenMix, ("choice", "features")),
    (ContextSource, ("weight",)),
)


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    activation_lr: float | None = None,
    *,
    without: Optimizer | None = None,
) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups: weight decay for matrices, none for biases, norms and our scalars.

    The bias of an up projection is 1 after a conversion, and decay would pull each FFN towards zero, also where those
    of experts are a matrix. Mamba's A and D ask for none; the scalars and per-channel parameters of an activation have
    their own neutral values, which aren't 0 either. Projections of which
    `train_only_gates` trains a half are in a third group, without decay: it would shrink the
    frozen half.

    Args:
        model: any model; parameters without gradient are left out, shared ones are in once.
        lr: learning rate.
        weight_decay: for the first group.
        activation_lr: learning rate of what activations have of their own (mixes, alpha, beta and decays of a state,
            thresholds and slopes), but for the matrices that choose a token's mix or make a context vector; None: as
            all others.
        without: another optimizer, such as `hf_glu.muon`'s, whose parameters are left out.

    Returns:
        Groups as `torch.optim` takes them, with a ``name`` each; for a Trainer:
        ``Trainer(..., optimizers=(AdamW(parameter_groups(model, 2e-5, 0.01)), None))``.
    """
    own = {id(p) for module in model.modules() if isinstance(module, OWN) for p in module.parameters()}
    wide = {id(p) for module in model.modules() for p in _wide(module)}
    norms = {id(p) for module in model.modules() if is_norm(module) for p in module.parameters()}
    masked = masked_parameters(model)
    others = {id(p) for group in (without.param_groups if without else ()) for p in group["params"]}
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "masked": [], "activation": []}
    for path, parameter in model.named_parameters():
        key = id(parameter)
        if not parameter.requires_grad or key in others:
            continue
        decays = parameter.ndim >= 2 and key not in own and key not in norms and not is_vector(path)
        apart = key in own and key not in wide and activation_lr is not None
        name = "masked" if key in masked else "activation" if apart else "decay" if decays else "no_decay"
        groups[name].append(parameter)
    rates = {"activation": activation_lr}
    return [
        {"name": n, "params": members, "lr": rates.get(n, lr), "weight_decay": weight_decay if n == "decay" else 0.0}
        for n, members in groups.items()
        if members
    ]


def is_vector(path: str) -> bool:
    """Return whether a parameter is a bias or a rate by its name, however many of it a tensor holds.

    Tables of relative positions are called biases, too, and have no decay either: 0 means as little in them.
    """
    return "bias" in path or path.rpartition(".")[2] in RATES


def _wide(module: nn.Module) -> list[nn.Parameter]:
    names = next((names for kind, names in WIDE if isinstance(module, kind)), ())
    return [parameter for name in names if (parameter := getattr(module, name)) is not None]
