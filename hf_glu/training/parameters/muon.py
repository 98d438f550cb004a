"""Muon for models whose gate and up halves lie in one parameter.

Muon (https://kellerjordan.github.io/posts/muon/) steps along the orthogonal matrix that is nearest to a matrix's
momentum. ``[gate | up]`` is two matrices in one parameter: taken as one, the half with the larger gradient would have
most of the step. Each half is orthogonalised by itself here; the state is kept, saved and loaded by parameter, as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_glu.activation.module import OwnedModule
from hf_glu.compat.muon import muon_of_halves
from hf_glu.errors import OptionError
from hf_glu.ffn.forward import is_alone
from hf_glu.ffn.linear import LINEAR
from hf_glu.ffn.sites import find_sites
from hf_glu.training.parameters.gates import masked_parameters


def muon(model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.1, **options: Any) -> torch.optim.Optimizer:
    """Return torch's Muon for a model's matrices, with the halves of each ``[gate | up]`` as two.

    Those are the weights of linear layers within the model's base, as ``[out, in]`` whichever way a layer stores them:
    no embeddings, no head, no router, no single row, and no projection of which `train_only_gates` trains a half. What
    an optimizer has to know of them stands in its groups. The rest is for another optimizer:
    ``parameter_groups(model, 3e-4, 0.01, without=optimizer)``.

    Args:
        model: any model.
        lr: learning rate.
        weight_decay: of all of these matrices.
        options: further ones of ``torch.optim.Muon``, such as ``adjust_lr_fn="match_rms_adamw"``.

    Raises:
        OptionError: there is no such matrix that is trained.
        IncompatibleTransformersError: torch has no Muon (before 2.9).
    """
    optimizer, groups = muon_of_halves(), _groups(model)
    if not groups:
        raise OptionError(f"{type(model).__name__} has no matrix between its embeddings and its head that is trained")
    made: torch.optim.Optimizer = optimizer(groups, lr=lr, weight_decay=weight_decay, **options)
    return made


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return groups of a model's matrices, by what `GatedMuon` has to know of them."""
    halves = {id(weight): dim for weight, dim in _halves(model)}
    groups: dict[tuple[int | None, bool], dict[str, Any]] = {}
    for linear in _linears(model):
        key = dim, transposed = halves.get(id(linear.weight)), isinstance(linear, Conv1D)
        known = ({} if dim is None else {"halves": dim}) | ({"transposed": True} if transposed else {})
        groups.setdefault(key, {"params": [], **known})["params"].append(linear.weight)
    return list(groups.values())


def _linears(model: nn.Module) -> list[Any]:
    base: nn.Module = getattr(model, getattr(model, "base_model_prefix", ""), model)
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    apart = {id(p) for module in base.modules() if isinstance(module, OwnedModule) for p in module.parameters()}
    apart |= tied | masked_parameters(model)
    linear: list[Any] = [module for module in base.modules() if isinstance(module, LINEAR)]
    found = {id(module.weight): module for module in linear if id(module.weight) not in apart}
    return [each for each in found.values() if each.weight.requires_grad and _is_matrix(each.weight)]


def _is_matrix(weight: Tensor) -> bool:
    return weight.ndim == 2 and min(weight.shape) > 1  # a row is a vector, as of a gate of shared experts


def _halves(model: nn.Module) -> list[tuple[Tensor, int]]:
    """Return each weight that holds gate and up, with the dimension that they lie along."""
    sites = [site for site in find_sites(model) if is_alone(site) and (site.widened or site.kind == "packed")]
    return [(site.in_proj.weight, 1 if isinstance(site.in_proj, Conv1D) else 0) for site in sites]
