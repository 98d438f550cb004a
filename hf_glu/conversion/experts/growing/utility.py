"""Which experts are worth more copies: the loss' gradient, on text, times what an expert adds.

With L the loss of a language model, summed over the tokens, and w_te the weight of expert e at token t (0 where t isn't
sent there), the utility of an expert is

    u_e = sum_t (w_te dL/dw_te)^2

where w dL/dw is the gradient by what the expert adds at t, times that: <dL/dW, W> of its out-projection W at t.
Copies are dealt out one by one, each to the expert with the largest u_e over the copies that it has.

Shapes: T tokens, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from heapq import heapify, heapreplace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.conversion.fit.calibration import Batches
from hf_glu.errors import OptionError
from hf_glu.ffn.experts import ExpertFFN, Routing
from hf_glu.ffn.sites import Site
from hf_glu.instruments.probe import evaluating

IGNORED = -100
Weighed = list[tuple[str, Tensor, Tensor]]  # a site's name, experts and weights ``[T, k]``


def utilities(model: Any, sites: Sequence[Site], batches: Batches) -> dict[str, Tensor]:
    """Return the utility of the experts at each site, by its name: ``[E]`` in float64.

    Raises:
        OptionError: the model is no language model, or the batches have no token ids; or they never reach a site.
    """
    if model.get_output_embeddings() is None:
        raise OptionError(
            f"experts' utility is told by a language model's loss, which {type(model).__name__} has none of: leave "
            "calibration out"
        )
    weighed: Weighed = []
    handles = [_hook(site, weighed) for site in sites]
    found: dict[str, Tensor] = {}
    try:
        for batch in batches:
            weighed.clear()
            loss = _loss(model, batch)
            gradients = torch.autograd.grad(loss, [weights for *_, weights in weighed], allow_unused=True)
            for (name, experts, weights), gradient in zip(weighed, gradients, strict=True):
                if gradient is not None:
                    effects = (weights.detach() * gradient).double().square()
                    found[name] = _added(found.get(name), sites, name, experts, effects)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [site.name for site in sites if site.name not in found]:
        raise OptionError(f"the calibration data never reach {missing[0]}: give what its stack reads, too")
    return found


def _added(old: Tensor | None, sites: Sequence[Site], name: str, experts: Tensor, values: Tensor) -> Tensor:
    if old is None:
        site = next(site for site in sites if site.name == name)
        old = values.new_zeros(expert_count(site.anchor))
    return old.scatter_add(0, experts.reshape(-1), values.reshape(-1))


def expert_count(layer: Any) -> int:
    """Return the number of routed experts of an expert FFN of ours or a bank."""
    return layer.options.count if isinstance(layer, ExpertFFN) else len(layer.down_proj)


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the sum over the tokens of a language model's loss, with what it reads as its labels."""
    ids = batch.get("input_ids")
    if ids is None:
        raise OptionError("experts' utility needs texts or token ids as calibration")
    mask = batch.get("attention_mask")
    labels = ids if mask is None or mask.shape != ids.shape else ids.masked_fill(mask == 0, IGNORED)
    with evaluating(model), torch.enable_grad():
        loss: Tensor = model(**batch, labels=labels).loss * labels.ne(IGNORED).sum()
    return loss


def _hook(site: Site, weighed: Weighed) -> Any:
    """Let what a layer's router decides start anew as weights that a gradient is asked for."""
    layer: Any = site.anchor
    if isinstance(layer, ExpertFFN):
        return layer.router.register_forward_hook(partial(_after_router, site.name, weighed))
    return layer.register_forward_pre_hook(partial(_before_bank, site.name, weighed), with_kwargs=True)


def _after_router(name: str, weighed: Weighed, module: nn.Module, args: Any, routing: Routing) -> Routing:
    weights = routing.weights.detach().requires_grad_()
    weighed.append((name, routing.experts, weights))
    return replace(routing, weights=weights)


def _before_bank(name: str, weighed: Weighed, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    names = ("hidden_states", "top_k_index", "top_k_weights")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    weights = given["top_k_weights"].detach().requires_grad_()
    weighed.append((name, given["top_k_index"], weights))
    return (given.pop("hidden_states"), given.pop("top_k_index"), weights), {
        key: value for key, value in given.items() if key != "top_k_weights"
    }


def deal(utility: Tensor, copies: int) -> Tensor:
    """Return how many of ``copies`` times as many experts each expert gets, one at least: ``[E]``."""
    worth = utility.tolist()
    counts = [1] * len(worth)
    waiting = [(-value, expert) for expert, value in enumerate(worth)]
    heapify(waiting)
    for _ in range(copies * len(worth) - len(worth)):
        expert = waiting[0][1]
        counts[expert] += 1
        heapreplace(waiting, (-worth[expert] / counts[expert], expert))
    return torch.tensor(counts)


def owners(sizes: Sequence[int], copies: int, utility: Tensor | None) -> list[Tensor]:
    """Return whose copies a layer's experts become, by group: ``[copies * size]`` places in the group, in order.

    Args:
        sizes: the experts of each group, which its copies stay in.
        copies: of an expert, on the mean.
        utility: of all experts ``[E]``; None: as many copies of each.
    """
    even: Callable[[int], Tensor] = lambda size: torch.full((size,), copies)  # noqa: E731
    parts = [None] * len(sizes) if utility is None else utility.cpu().split(list(sizes))
    counts = [even(size) if part is None else deal(part, copies) for size, part in zip(sizes, parts, strict=True)]
    return [torch.arange(len(count)).repeat_interleave(count) for count in counts]


def owners_in_layer(whose: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return `owners` as places in the layer, whose groups had ``sizes`` experts, and not in their groups."""
    starts = accumulate(sizes, initial=0)
    return torch.cat([own + start for own, start in zip(whose, starts, strict=False)])
