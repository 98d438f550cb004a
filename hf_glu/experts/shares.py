"""Which part of its step's mean loss the loss of a micro-batch is, where it is divided by the whole step's count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_glu.errors import TrainingError

ITEMS = "num_items_in_batch"
IGNORED = -100


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
    """Tell whether autograd leads from ``loss`` to ``other``."""
    wanted, seen = get_gradient_edge(other).node, set[Node]()
    nodes: list[Node | None] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is wanted:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return False


def shifts(model: Any) -> bool:
    """Tell whether a model's loss compares each token with the label of the next."""
    causal = getattr(model, "loss_function", None) is ForCausalLMLoss
    return causal and not getattr(model.config, "is_encoder_decoder", False)
