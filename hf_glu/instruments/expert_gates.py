"""How open the gates of experts are at the tokens that they are sent.

With g_e ``[T, W]`` the pre-activation of expert e's gate, and E(t) the k experts of token t:

    openness_t = mean_{e in E(t)} mean_w sigmoid(g_e[t])

It is computed from what the experts are given, by their own weights, whatever kernel runs them: one in-projection more.

Shapes: T tokens, k experts a token, H hidden size, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_glu.activation.elementwise import name_of
from hf_glu.activation.stock import elementwise_names
from hf_glu.compat.of_models import HAS_BIAS, IS_TRANSPOSED, is_concatenated
from hf_glu.errors import OptionError
from hf_glu.ffn.experts.ffn import ExpertFFN
from hf_glu.ffn.experts.group import banks_of, is_gated
from hf_glu.ffn.experts.native import MixedBank, bank_width, built_in


@torch.no_grad()
def expert_openness(layer: nn.Module, x: Tensor, experts: Tensor) -> Tensor:
    """Return how open the gates of each token's experts are, the mean of their channels and of them: ``[T]``.

    Args:
        layer: an expert FFN of ours, or one of Transformers' own banks.
        x: what it is given, ``[T, H]``.
        experts: of each token, ``[T, k]``.

    Raises:
        OptionError: the experts' weights aren't there yet.
    """
    total = torch.zeros(len(x), device=x.device)
    for expert in experts.unique().tolist():
        rows = (experts == expert).any(-1).nonzero().squeeze(-1)
        g = expert_gate(layer, x[rows], expert)
        total[rows] += g.to(torch.promote_types(g.dtype, torch.float32)).sigmoid().mean(-1).float()
    return total / experts.shape[-1]


def expert_gate(layer: Any, x: Tensor, expert: int) -> Tensor:
    """Return the pre-activation of one expert's gate, all that its activation is given where it is dense: ``[N, W]``.

    Args:
        layer: as above.
        x: its tokens, ``[N, H]``.
        expert: which.

    Raises:
        OptionError: its weights aren't there yet.
    """
    if isinstance(layer, ExpertFFN):
        for bank in banks_of(layer.banks):
            if expert < bank.count:
                rows = slice(bank.width if is_gated(bank.name) else None)
                bias = None if bank.in_bias is None else bank.in_bias[expert, rows]
                return _linear(x, bank.in_proj[expert, rows], bias)
            expert -= bank.count
    width = bank_width(layer)
    rows = slice(width) if is_concatenated(layer) else slice(None, None, 2)
    weight = layer.gate_up_proj[expert].mT if IS_TRANSPOSED.of(layer) else layer.gate_up_proj[expert]
    bias = layer.gate_up_proj_bias[expert].flatten()[rows] if HAS_BIAS.of(layer) else None
    return _linear(x, weight[rows], bias)


def bank_activations(bank: Any) -> str:
    """Return the names of the activations of one of Transformers' own banks, each once."""
    if isinstance(bank, MixedBank):
        return ", ".join(dict.fromkeys(group.name for group in bank.groups))
    return built_in(bank) or name_of(bank.act_fn, tuple(elementwise_names())) or type(bank.act_fn).__name__


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.is_meta:  # what is computed with it is whatever lies in memory
        raise OptionError(
            "the gates of experts can't be recorded while their weights are offloaded: load the model whole on a device"
        )
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
