"""Which part of its step's mean loss the loss of a micro-batch is.

It is counted (`share`) where the loss is divided by the whole step's count, and read off the gradient
(`cross_entropies`) where the loss is unknown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from hf_glu.compat.of_models import CAUSAL_LOSS
from hf_glu.errors import TrainingError

ITEMS = "num_items_in_batch"
IGNORED = -100
CHUNK = 2**24  # numbers of a float32 copy of logits
ROUNDING = 1e-3


@torch.compiler.disable
def traced(items: Any) -> Tensor:
    """Return the count of a step's items as a number that autograd follows; see `share`."""
    if isinstance(items, Tensor) and items.requires_grad:
        return items
    return torch.as_tensor(items, dtype=torch.float32).detach().clone().requires_grad_()


def share(loss: Tensor, items: Tensor | None, labels: Any, *, shifted: bool) -> Tensor | float:
    """Return which part of its step's mean loss a micro-batch's loss is.

    Args:
        loss: of the micro-batch.
        items: the step's count as `traced` gives it; None, or ``loss`` isn't divided by it: the loss is a mean, and 1.
        labels: of the micro-batch: its share is that of those that count.
        shifted: whether the first label of each text is no item, as in causal language models.

    Raises:
        TrainingError: there are no labels to count.
    """
    if items is None or not depends_on(loss, items):
        return 1.0
    if not isinstance(labels, Tensor):
        raise TrainingError(f"the loss is divided by {ITEMS}, but the model got no labels to count")
    return (labels[..., 1:] if shifted else labels).ne(IGNORED).sum().to(items.device) / items.detach()


def depends_on(loss: Tensor, other: Tensor) -> bool:
    """Return whether autograd leads from ``loss`` to ``other``."""
    wanted = get_gradient_edge(other).node
    return any(node is wanted for node in nodes_behind(loss))


def nodes_behind(loss: Tensor) -> Iterator[Node]:
    """Yield the nodes of autograd's graph that ``loss`` leads to, the nearest first: a loss is added near its end."""
    seen, nodes = set[Node](), deque([loss.grad_fn])
    while nodes:
        node = nodes.popleft()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            nodes.extend(following for following, _ in node.next_functions)


def shifts(model: Any) -> bool:
    """Return whether a model's loss compares each token with the label of the next."""
    causal = getattr(model, "loss_function", None) is CAUSAL_LOSS.find()
    return causal and not getattr(model.config, "is_encoder_decoder", False)


@torch.no_grad()
def cross_entropies(logits: Tensor, gradient: Tensor) -> Tensor | None:
    """Return what all cross-entropies in a loss weigh together, whatever it was divided or multiplied by.

    The gradient of a loss sum_i c_i CE_i at logits i is c_i (p_i - e_i), with p the softmax and e 1 at the label and
    else 0: c_i is its sum over the classes but the label, divided by theirs of p. The sum of the c_i is 1 for a mean.

    Returns:
        The sum; None where the gradient has another form, or can't show that it hasn't: two classes of one text.
    """
    classes = logits.shape[-1]
    if classes < 2:
        return None
    weights, wrong, size = [], logits.new_zeros((), dtype=torch.float32), logits.new_zeros((), dtype=torch.float32)
    chunk = max(1, CHUNK // classes)
    pairs = zip(logits.reshape(-1, classes).split(chunk), gradient.reshape(-1, classes).split(chunk), strict=True)
    for each, rows in pairs:
        p, d = each.float().softmax(-1), rows.float()
        label = d.argmin(-1, keepdim=True)
        rest, others = d.scatter(1, label, 0), p.scatter(1, label, 0)
        c = rest.sum(-1, keepdim=True) / others.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
        wrong += (rest - c * others).abs().sum() + (d.gather(1, label) + rest.sum(-1, keepdim=True)).abs().sum()
        size += d.abs().sum()
        weights.append(c.flatten())
    c, rounding = torch.cat(weights), torch.finfo(gradient.dtype).eps
    known = wrong <= max(ROUNDING, 4 * rounding) * size + rounding * c.sum()
    used = c[c != 0]
    if classes == 2:  # where every gradient that is the same for both has this form
        known &= len(used) > 1 and bool(used.max() - used.min() <= max(ROUNDING, 4 * rounding) * used.max())
    return c.sum() if known and len(used) else None
