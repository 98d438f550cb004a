"""Which experts each token uses, and the losses that keep them in use.

Shapes: T tokens, H hidden size, E experts, k experts a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from hf_glu.activation.context import Reader
from hf_glu.activation.context.hooks import TIME_FIRST
from hf_glu.activation.context.passes import current_pass
from hf_glu.activation.module import OwnedModule
from hf_glu.config.experts import ExpertOptions
from hf_glu.errors import TrainingError
from hf_glu.ffn.experts.copies import Copies, full_linear

STD = 0.02


@dataclass(frozen=True)
class Routing:
    """What a router decided.

    Attributes:
        weights: ``[T, k]`` in float32, each row sums to 1.
        scores: ``[T, k]`` in float32, of the chosen experts, as they were before that.
        experts: ``[T, k]``, the best first; equal scores in the experts' order.
        logits: ``[T, E]`` in float32; of copies, their expert's + log q, so that their softmax is its share times q.
    """

    weights: Tensor
    scores: Tensor
    experts: Tensor
    logits: Tensor


class Router(Reader, OwnedModule):
    """Scores = softmax(W x) or sigmoid(W x) in float32; the k best are renormalised to sum to 1.

    With a ``bias_rate`` the k best of scores + bias_rate * steps are taken, and their weights are those of the scores.
    Where the experts have copies, each token goes to one copy of each of its experts (`hf_glu.ffn.experts.copies`).

    Args:
        hidden: H.
        options: of the experts.
    """

    needs_sequences = False
    steps: Tensor | None
    load: Tensor | None

    def __init__(self, hidden: int, options: ExpertOptions) -> None:
        super().__init__()
        self.options, self.label = options, ""
        self.weight = nn.Parameter(torch.empty(options.originals, hidden))
        for name in ("steps", "load"):  # whole numbers, which no dtype of the model rounds
            self.register_buffer(name, torch.empty(options.originals, dtype=torch.long) if options.bias_rate else None)
        self.copies = Copies(hidden, options.originals, options.copies) if options.copies > 1 else None
        if self.weight.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random weights: experts that are copies need different tokens to become different."""
        init.normal_(self.weight, std=STD)
        for buffer in self.buffers(recurse=False):
            init.zeros_(buffer)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens ``[T, H]``.

        Raises:
            TrainingError: a score is NaN.
        """
        if self.training and self.options.jitter:
            low, high = 1 - self.options.jitter, 1 + self.options.jitter
            x = x * torch.empty_like(x).uniform_(low, high)
        logits = full_linear(x, self.weight)
        scores = logits.softmax(-1) if self.options.router == "softmax" else logits.sigmoid()
        checked = not torch.compiler.is_compiling() and logits.device.type == "cpu" and logits.numel() > 0
        if checked and math.isnan(logits.detach().max()):  # which hands a NaN on, in one pass
            where = self.label or "of an expert FFN"
            raise TrainingError(f"the router {where} gave NaN: its input has NaN, or training diverged")
        ranked = scores if self.steps is None else scores + self.options.bias_rate * self.steps
        best, experts = ranked.sort(dim=-1, descending=True, stable=True)  # topk breaks ties as it likes
        best, experts = best[:, : self.options.top_k], experts[:, : self.options.top_k]
        if self.steps is not None:
            best = scores.gather(-1, experts)
        ones = self.options.weights == "ones"  # x / x is 1, and has a gradient that the router learns from
        given = best.clamp_min(1e-20) if ones else best
        weights = given / (given.detach() if ones else given.sum(-1, keepdim=True).clamp_min(1e-20))
        return self._spread(x, Routing(weights, best, experts, logits))

    def _spread(self, x: Tensor, routing: Routing) -> Routing:
        """Send tokens to copies of their experts, where there are some; logits are the experts' + log q then."""
        if self.copies is None:
            return routing
        chosen, factor, shares = self.copies(x, routing.experts)
        logits = routing.logits.index_select(1, self.copies.owner) + shares
        return Routing(routing.weights * factor, routing.scores, chosen, logits)

    def loss(self, routing: Routing) -> Tensor:
        """Return balance * E sum_e f_e P_e + z * mean(logsumexp(logits)^2).

        f_e is the share of tokens that use expert e (their sum is k), P_e its mean score; padding doesn't count. The
        config's ``router_aux_loss_coef`` is the balance coefficient, 0 while router logits are asked for.
        """
        options, logits, counts = self.options, routing.logits, self.counts(len(routing.logits))
        now = current_pass()
        balance = options.balance if now is None or now.balance is None else now.balance
        loss = logits.new_zeros(())
        if balance:
            softmax = options.router == "softmax"
            scores = logits.softmax(-1) if softmax else functional.normalize(logits.sigmoid(), p=1, dim=-1)
            used = mean(functional.one_hot(routing.experts, logits.shape[1]).sum(1).to(scores.dtype), counts)
            loss = loss + balance * logits.shape[1] * (used * mean(scores, counts)).sum()
        return loss + options.z * mean(logits.logsumexp(-1).square(), counts) if options.z else loss

    def counts(self, tokens: int) -> Tensor | None:
        """Return which tokens are no padding, ``[T]``; None: all count."""
        reading, now = self.current(), current_pass()
        if now is None or reading is None or reading.valid is None or reading.valid.numel() != tokens:
            return None
        time_first = getattr(getattr(now.stack, "config", None), "model_type", "") in TIME_FIRST
        return (reading.valid.T if time_first else reading.valid).reshape(-1).float()

    def loads(self, routing: Routing) -> Tensor | None:
        """Return how many tokens use each expert, ``[E]``, whatever copy; None: there is no bias to balance."""
        if self.load is None:
            return None
        experts = routing.experts if self.copies is None else self.copies.owner[routing.experts]
        used = functional.one_hot(experts, len(self.load)).sum(1)
        counts = self.counts(len(used))
        return used.sum(0) if counts is None else (counts.long().unsqueeze(1) * used).sum(0)

    @torch.no_grad()
    def rebalance(self) -> None:
        """Move the bias by a step towards the experts with a load below the mean, and count anew."""
        if self.steps is None or self.load is None:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.load)
        self.steps += (self.load.sum() - self.load * len(self.load)).sign()
        self.load.zero_()


def mean(values: Tensor, counts: Tensor | None) -> Tensor:
    """Return the mean over the tokens that count: ``[...]`` of ``[T, ...]``."""
    if counts is None:
        return values.mean(0)
    return torch.tensordot(counts.to(values.dtype), values, dims=([0], [0])) / counts.sum().clamp_min(1)
