"""An FFN of experts: route, sort once, compute each group's contiguous slice, weigh and put back.

Shapes: T tokens, H hidden size, k experts a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation import OwnedModule
from hf_glu.expert_options import ExpertOptions
from hf_glu.experts.bank import Bank
from hf_glu.experts.losses import Scale, inject
from hf_glu.experts.router import Router, Routing


class ExpertFFN(OwnedModule):
    """y = sum over the k experts e of a token of weight_e out_e(act_e(in_e(x))), + the shared experts.

    No token is dropped, whatever the load. Takes the place of a stock FFN: input and output are ``[..., H]``.

    Args:
        hidden: H.
        width: units of an expert, where its group doesn't say.
        options: the experts.
        bias: whether the experts have biases.
        mix: of learnable activations.
        dropout: of the FFN that it replaces.
    """

    def __init__(
        self, hidden: int, width: int, options: ExpertOptions, *, bias: bool, mix: dict[str, Any] | None = None,
        dropout: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.options, self.hidden, self.width = options, hidden, width
        self.router = Router(hidden, options)
        self.banks = nn.ModuleList(Bank(group, hidden, width, bias=bias, mix=mix) for group in options.experts)
        self.shared = nn.ModuleList(Bank(group, hidden, width, bias=bias, mix=mix) for group in options.always_on)
        self.dropout = dropout
        self.scale = Scale()
        self.loss: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what a listing of FFNs shows."""
        groups = f"{self.options.groups}, top {self.options.top_k}"
        count = sum(parameter.numel() for parameter in self.parameters())
        return {
            "layout": "experts", "kind": "hf_glu experts", "hidden": self.hidden, "width": self.width,
            "activation": groups, "parameters": count,
        }  # fmt: skip

    def reset_parameters(self) -> None:
        """Nothing of its own: router and banks initialise themselves."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the experts."""
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens)
        out = self._routed(tokens, routing)
        for bank in banks_of(self.shared):
            for expert in range(bank.count):
                counts = torch.tensor([len(tokens) * (each == expert) for each in range(bank.count)], device=x.device)
                out = out + bank(tokens, counts, self.options.backend).to(out.dtype)
        if self.training and len(tokens):
            loss = self.router.loss(routing)
            self.loss = loss.detach()
            if torch.is_grad_enabled():  # not in the first pass of a layer that checkpointing repeats
                out = inject(out, loss, self.scale)
        out = out.to(x.dtype).view(*x.shape[:-1], self.hidden)
        return out if self.dropout is None else self.dropout(out)

    def _routed(self, tokens: Tensor, routing: Routing) -> Tensor:
        """Return the weighted outputs of the routed experts: ``[T, H]``."""
        experts = routing.experts.reshape(-1)
        order = experts.argsort(stable=True)
        counts = torch.bincount(experts, minlength=self.options.count)
        gathered = tokens[order // routing.experts.shape[1]]
        groups = counts.split([bank.count for bank in banks_of(self.banks)])
        sizes = [len(gathered)] if len(groups) == 1 else [int(size) for size in torch.stack([g.sum() for g in groups])]
        parts = [
            bank(part, group, self.options.backend)
            for bank, part, group in zip(self.banks, gathered.split(sizes), groups, strict=True)
        ]  # a group without a token, too: its parameters get a gradient of 0, which DDP waits for
        outputs = torch.cat(parts)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        each = outputs[back].view(*routing.experts.shape, self.hidden)
        dtype = torch.promote_types(each.dtype, torch.float32)
        return (each.to(dtype) * routing.weights.to(dtype).unsqueeze(-1)).sum(1)


def banks_of(modules: nn.ModuleList) -> list[Bank]:
    """Return a list of modules as the banks that they are."""
    return [module for module in modules if isinstance(module, Bank)]


def find_experts(model: nn.Module) -> dict[str, ExpertFFN]:
    """Return the expert FFNs of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertFFN)}
