"""Which experts each token uses, and the losses that keep them in use.

Shapes: T tokens, H hidden size, E experts, k experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from hf_glu.activation import OwnedModule
from hf_glu.errors import TrainingError
from hf_glu.expert_options import ExpertOptions

STD = 0.02


@dataclass(frozen=True)
class Routing:
    """What a router decided.

    Attributes:
        weights: ``[T, k]`` in float32, each row sums to 1.
        experts: ``[T, k]``, the best first; equal scores in the experts' order.
        logits: ``[T, E]`` in float32.
    """

    weights: Tensor
    experts: Tensor
    logits: Tensor


class Router(OwnedModule):
    """Scores = softmax(W x) or sigmoid(W x) in float32; the k best are renormalised to sum to 1.

    Args:
        hidden: H.
        options: of the experts.
    """

    def __init__(self, hidden: int, options: ExpertOptions) -> None:
        super().__init__()
        self.options, self.label = options, ""
        self.weight = nn.Parameter(torch.empty(options.count, hidden))
        if self.weight.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random weights: experts that are copies need different tokens to become different."""
        init.normal_(self.weight, std=STD)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens ``[T, H]``.

        Raises:
            TrainingError: a score is NaN.
        """
        if self.training and self.options.jitter:
            low, high = 1 - self.options.jitter, 1 + self.options.jitter
            x = x * torch.empty_like(x).uniform_(low, high)
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            logits = functional.linear(x.to(dtype), self.weight.to(dtype))
        scores = logits.softmax(-1) if self.options.router == "softmax" else logits.sigmoid()
        if not torch.compiler.is_compiling() and logits.device.type == "cpu" and logits.isnan().any():
            where = self.label or "of an expert FFN"
            raise TrainingError(f"the router {where} gave NaN: its input has NaN, or training diverged")
        best, experts = scores.sort(dim=-1, descending=True, stable=True)  # topk breaks ties as it likes
        best, experts = best[:, : self.options.top_k], experts[:, : self.options.top_k]
        if self.options.weights == "ones":  # x / x is 1, and has a gradient that the router learns from
            best = best.clamp_min(1e-20)
            return Routing(best / best.detach(), experts, logits)
        return Routing(best / best.sum(-1, keepdim=True).clamp_min(1e-20), experts, logits)

    def loss(self, routing: Routing) -> Tensor:
        """Return balance * E sum_e f_e P_e + z * mean(logsumexp(logits)^2).

        f_e is the share of tokens that use expert e (their sum is k), P_e its mean score.
        """
        options, logits = self.options, routing.logits
        softmax = options.router == "softmax"
        scores = logits.softmax(-1) if softmax else functional.normalize(logits.sigmoid(), p=1, dim=-1)
        used = functional.one_hot(routing.experts, options.count).sum(1).float().mean(0)
        balance = options.count * (used * scores.mean(0)).sum()
        return options.balance * balance + options.z * logits.logsumexp(-1).square().mean()
