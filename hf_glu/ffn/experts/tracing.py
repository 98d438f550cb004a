"""What experts compute while a graph is traced: the same, by operations that depend on no values of the example.

Training code sorts tokens by expert and asks how many each has; a tracer can't. Here the experts go one after the
other, each with the tokens that chose it, as all exporters can write it down.

Shapes: T tokens, N of which chose an expert, k experts a token, E experts, H hidden size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_glu.activation.context.confidence import Confidence
from hf_glu.activation.context.passes import current_pass, within
from hf_glu.compat.of_models import HAS_BIAS, IS_TRANSPOSED, POST_NORM
from hf_glu.ffn.experts.group import Bank, banks_of


def experts(x: Tensor, router: nn.Module, banks: nn.Module, shared: nn.Module) -> Tensor:
    """Return what an FFN of experts computes of ``x`` ``[..., H]``, in float32 at least, before dropout."""
    tokens = x.reshape(-1, x.shape[-1])
    routing = router(tokens)
    each = [(bank, expert) for bank in banks_of(banks) for expert in range(bank.count)]
    out = _routed(tokens, routing.experts, routing.weights, routing.scores, each)
    for bank in banks_of(shared):
        for expert in range(bank.count):
            out = out + _expert(bank, expert, tokens).to(out.dtype)
    return out.view(x.shape)


def _routed(tokens: Tensor, chosen: Tensor, scale: Tensor, scores: Tensor, each: list[tuple[Any, int]]) -> Tensor:
    """Return the weighted sum ``[T, H]`` of experts, each a bank and the expert's place in it.

    Of the chosen ones, ``[T, k]``, the outputs are multiplied by ``scale``; the activations hear ``scores``.
    """
    total = torch.zeros_like(tokens, dtype=torch.promote_types(tokens.dtype, scale.dtype))
    for number, (bank, expert) in enumerate(each):
        mine = chosen == number
        weight, said = (scale * mine).sum(1), (scores * mine).sum(1)
        if isinstance(bank, Bank) and bank.reads:  # it is given the text around its tokens, too, as padding
            y = _expert(bank, expert, tokens, said, mine.any(1))
            total = total + weight.unsqueeze(1) * y
        else:
            rows = mine.any(1).nonzero().squeeze(1)
            y = _expert(bank, expert, tokens[rows], said[rows])
            total = total.index_add(0, rows, (weight[rows].unsqueeze(1) * y).to(total.dtype))
    return total


def _expert(bank: Any, expert: int, x: Tensor, scores: Tensor | None = None, mine: Tensor | None = None) -> Tensor:
    """Return an expert's outputs for ``x``, both ``[N, H]``, whose router gave it ``scores`` ``[N]``.

    ``mine`` ``[T]`` are those of an expert that reads a text.
    """
    if not isinstance(bank, Bank):
        return bank(expert, x, scores)
    act = bank.acts[expert if bank.reads else 0]
    hidden = _linear(x, bank.in_proj, bank.in_bias, expert)
    with _told(mine):
        units = act(hidden, *bank.heard(scores, expert)).to(bank.out_proj.dtype)
    return _linear(units, bank.out_proj, bank.out_bias, expert)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    return functional.linear(x, weight[expert], None if bias is None else bias[expert].to(x.dtype))


def _told(mine: Tensor | None) -> AbstractContextManager[None]:
    """Let readers take all tokens but ``mine`` for padding; None: as they are told anyway."""
    now = current_pass()
    if now is None or now.reading is None or mine is None:
        return nullcontext()
    reading = now.reading
    own = mine.view(reading.batch, reading.length)
    valid = own if reading.valid is None else own & reading.valid
    return within(replace(now, reading=replace(reading, valid=valid)))


def native_experts(bank: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return what `MixedBank.forward` does, by operations that depend on no values."""
    top_k_index, top_k_weights = bank.sent(hidden_states, top_k_index, top_k_weights)
    groups = [(number, own) for number, group in enumerate(bank.groups) for own in range(group.count)]
    one = partial(_native_expert, bank, groups)
    each = [(one, expert) for expert in range(len(groups))]
    out = _routed(hidden_states, top_k_index, top_k_weights, top_k_weights, each)
    return out.to(hidden_states.dtype)


def _native_expert(bank: Any, groups: list[tuple[int, int]], expert: int, x: Tensor, scores: Tensor) -> Tensor:
    number, own = groups[expert]
    units = bank.gate(number, _projected(bank, x, "gate_up_proj", expert), Confidence(scores, own))
    out = _projected(bank, units, "down_proj", expert)
    return bank.post_expert_norm(out) if POST_NORM.of(bank, False) else out


def _projected(bank: Any, x: Tensor, name: str, expert: int) -> Tensor:
    weight = getattr(bank, name)[expert]
    bias = getattr(bank, f"{name}_bias")[expert].flatten() if HAS_BIAS.of(bank) else None
    return functional.linear(x, weight.T if IS_TRANSPOSED.of(bank) else weight, bias)
