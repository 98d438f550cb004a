"""How the routers use their experts: load, entropy, by layer and by a label of the text's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.config.layers import STACKS
from hf_glu.config.showing import Shown, ShownTable
from hf_glu.errors import NoSiteError
from hf_glu.ffn.experts.ffn import find_experts
from hf_glu.ffn.experts.native import is_bank
from hf_glu.ffn.experts.router import Routing
from hf_glu.ffn.identify import top_k_of
from hf_glu.instruments.expert_tokens import routed
from hf_glu.instruments.recorder import Call, watching


@dataclass(kw_only=True, eq=False)
class _Sum:
    """What one router did with the tokens of one label: how many, how many each expert got ``[E]``, their entropies."""

    load: Tensor
    tokens: int = 0
    entropy: float = 0.0


class ExpertStatistics(Shown):
    """Running sums over what the routers saw; `label` and `mask` can be set before each forward pass.

    Attributes:
        label: what the tokens that come are counted under, such as the domain of the text.
        mask: ``[batch, length]``, 1 where a token counts; None: where what the model is given says that it is no
            padding (`hf_glu.instruments.tokens`).
    """

    def __init__(self) -> None:
        self.label = "all"
        self.mask: Tensor | None = None
        self._sums: dict[tuple[str, str], _Sum] = {}

    def add(self, name: str, routing: Routing, call: Call) -> None:
        """Add what the router of one FFN decided in a call of it."""
        experts, logits, kept = routing.experts, routing.logits.detach(), call.tokens.kept
        if self.mask is not None and self.mask.numel() == len(logits):
            kept = self.mask.reshape(-1).bool()
        if kept is not None:
            experts, logits = experts[kept.to(experts.device)], logits[kept.to(logits.device)]
        scores = logits.softmax(-1)
        entropy = -(scores * scores.clamp_min(1e-20).log()).sum(-1)
        load = torch.bincount(experts.reshape(-1), minlength=logits.shape[1]).cpu()
        total = self._sums.setdefault((name, self.label), _Sum(load=torch.zeros_like(load)))
        total.tokens += len(logits)
        total.load += load
        total.entropy += float(entropy.sum())

    def to_dict(self) -> dict[str, Any]:
        """Return rows by layer and label: tokens, each expert's share of the load, the routers' mean entropy (nats).

        No token is ever dropped.
        """
        rows = []
        for (layer, label), total in self._sums.items():
            load = total.load.double() / total.load.sum().clamp_min(1)
            entropy = total.entropy / max(1, total.tokens)
            rows.append(
                {"layer": layer, "label": label, "tokens": total.tokens, "load": load.tolist(), "entropy": entropy}
            )
        return {"rows": rows, "dropped": 0}

    def _table(self) -> ShownTable:
        columns = ("layer", "label", "#tokens", "#least load", "#most load", "#entropy")
        rows = [
            (row["layer"], row["label"], f"{row['tokens']:,}", f"{min(row['load']):.1%}", f"{max(row['load']):.1%}",
             f"{row['entropy']:.2f}")
            for row in self.to_dict()["rows"]
        ]  # fmt: skip
        return ShownTable(title="Experts' shares of the tokens", columns=columns, rows=rows)

    def distance(self, one: str, other: str) -> float:
        """Return how far the loads of two labels are apart: 1/2 sum_e |p_e - q_e|, the mean of the layers.

        Raises:
            KeyError: nothing was counted under a label.
        """
        layers = dict.fromkeys(layer for layer, _ in self._sums)
        pairs = [[self._sums[layer, label].load.double() for label in (one, other)] for layer in layers]
        apart = [(p / p.sum() - q / q.sum()).abs().sum() / 2 for p, q in pairs]
        return float(torch.stack(apart).mean())


@contextmanager
def expert_statistics(model: nn.Module) -> Iterator[ExpertStatistics]:
    """Count what the routers of ``model`` decide within the block.

    Raises:
        NoSiteError: the model has no experts of ours.
    """
    found = find_experts(model)
    if not found:
        raise NoSiteError(f"{type(model).__name__} has no experts: hf_glu.convert(model, NAME, experts=...) makes some")
    statistics = ExpertStatistics()
    with watching(
        model, [watch for name, ffn in found.items() for watch in routed(ffn, partial(statistics.add, name))]
    ):
        yield statistics


def stack_of(name: str) -> str | None:
    """Return the stack that the path of a module names: ``encoder``, ``decoder`` or None."""
    return next((part for part in name.split(".") if part in STACKS), None)


def active_parameters(model: nn.Module) -> int:
    """Return how many parameters a token uses: all but the routed experts that it isn't sent to.

    Of E routed experts a token uses k, so that 1 - k/E of the routed weights are idle. Groups of different sizes count
    as the mean of their experts: which of them a token uses is up to the router. Shared experts, routers and what the
    experts of a group have in common count in full. Transformers' own banks (Mixtral) count the same, with k as the
    config around them says it (``num_experts_per_tok``).
    """
    idle = sum(ffn.idle for ffn in find_experts(model).values())
    for name, module in model.named_modules():
        if is_bank(module) and (top_k := top_k_of(model, name)):
            routed = sum(part.numel() for part in module.parameters(recurse=False))
            idle += routed * (1 - top_k / len(module.get_parameter("down_proj")))
    return sum(part.numel() for part in model.parameters()) - round(idle)
