"""`nn.Linear` and GPT-2's `Conv1D` (the same map with its weight transposed) seen as one thing.

Shapes: weight rows are ``[out_features, in_features]`` here, whichever way the module stores them.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
AnyLinear: TypeAlias = nn.Linear | Conv1D


def in_features(linear: AnyLinear) -> int:
    """Return the size of the input."""
    return linear.nx if isinstance(linear, Conv1D) else linear.in_features


def out_features(linear: AnyLinear) -> int:
    """Return the size of the output."""
    return linear.nf if isinstance(linear, Conv1D) else linear.out_features


def weight_rows(linear: AnyLinear) -> Tensor:
    """Return the weight as ``[out_features, in_features]`` (a view)."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def parameter_count(linear: nn.Module) -> int:
    """Return the number of a module's own parameters."""
    return sum(parameter.numel() for parameter in linear.parameters(recurse=False))


@torch.no_grad()
def set_rows(linear: AnyLinear, rows: Tensor, bias: Tensor | None) -> None:
    """Give ``linear`` the weight ``rows`` ``[out, in]`` and ``bias`` ``[out]`` in place, keeping the module itself.

    The module keeps its identity (hooks, names); its parameters are new ones, trainable where the old ones were (a new
    bias where the weight was).
    """
    trainable = linear.weight.requires_grad
    bias_trainable = trainable if linear.bias is None else linear.bias.requires_grad
    stored = rows.T.contiguous() if isinstance(linear, Conv1D) else rows.contiguous()
    linear.weight = nn.Parameter(stored, requires_grad=trainable)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=bias_trainable)
    if isinstance(linear, Conv1D):
        linear.nf, linear.nx = rows.shape
    else:
        linear.out_features, linear.in_features = rows.shape


def resize(linear: AnyLinear, outputs: int, inputs: int, *, bias: bool) -> None:
    """Give ``linear`` another shape, on its device, in its dtype, with its class's own initialisation."""
    old = linear.weight
    rows = torch.empty(outputs, inputs, device=old.device, dtype=old.dtype)
    set_rows(linear, rows, torch.zeros(outputs, device=old.device, dtype=old.dtype) if bias else None)
    if old.device.type == "meta":
        return
    if isinstance(linear, Conv1D):
        init.normal_(linear.weight, std=0.02)
    else:
        linear.reset_parameters()
