"""How well a language model that is in memory predicts text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_glu.instruments.probe import evaluating
from hf_glu.instruments.recorder import Batch


@torch.no_grad()
def next_token_perplexity(
    model: nn.Module, batches: Iterable[Batch], *, skipped: Iterable[int] | None = None
) -> tuple[float, int]:
    """Return exp of the mean -log p(token | those before it) of a causal model, and of how many tokens; no padding.

    Args:
        model: a causal language model.
        batches: ``input_ids`` ``[B, T]``, with an ``attention_mask`` where there is padding.
        skipped: of each text in turn, how many first tokens don't count; None: none but its first.
    """
    total, count = 0.0, 0
    begins = None if skipped is None else iter(skipped)
    with evaluating(model):
        for batch in batches:
            logits: Tensor = _logits(model, batch)[:, :-1]
            ids, mask = batch["input_ids"][:, 1:], batch.get("attention_mask")
            kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, 1:].bool() & mask[:, :-1].bool()
            if begins is not None:
                begin = torch.tensor(list(islice(begins, len(ids))), device=ids.device)
                kept &= torch.arange(1, ids.shape[1] + 1, device=ids.device) >= begin.unsqueeze(1)
            total += float(cross_entropy(logits[kept].float(), ids[kept], reduction="sum").double())
            count += int(kept.sum())
    mean = total / max(count, 1)
    return (math.exp(mean) if mean < 700 else math.inf), count


def _logits(model: Any, batch: Batch) -> Tensor:
    found: Tensor = model(**batch).logits
    return found
