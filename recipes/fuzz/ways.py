"""Ways of giving a model a text: each returns two answers that must be the same."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def ask(model: Any, tokens: Tensor, cache: Any = None, **more: Any) -> tuple[Tensor, Any]:
    """Return the outputs for some tokens, and the cache."""
    given = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        source = torch.arange(20, 27).expand(len(tokens), -1)
        more = {f"decoder_{key}" if key == "attention_mask" else key: value for key, value in more.items()}
        given = {"input_ids": source, "decoder_input_ids": tokens}
    if cache is not None or "use_cache" in more:
        more |= {"past_key_values": cache, "use_cache": True}
    found = model(**given, **more)
    return found[0], getattr(found, "past_key_values", None)


def whole(model: Any, tokens: Tensor, **more: Any) -> Tensor:
    """Return the outputs for a whole text."""
    return ask(model, tokens, **more)[0]


def in_pieces(model: Any, tokens: Tensor, sizes: list[int], cache: Any = None) -> tuple[Tensor, Any]:
    """Return the outputs for a text that comes in pieces."""
    found = []
    for piece in tokens.split(sizes, dim=1):
        out, cache = ask(model, piece, cache, use_cache=True)
        found.append(out)
    return torch.cat(found, 1), cache


def _sizes(random: Random, length: int) -> list[int]:
    sizes = []
    while sum(sizes) < length:
        sizes.append(random.randint(1, length - sum(sizes)))
    return sizes


def chunks(model: Any, tokens: Tensor, random: Random) -> Pair:
    """Chunks of any sizes."""
    return in_pieces(model, tokens, _sizes(random, tokens.shape[1]))[0], whole(model, tokens)


def one_by_one(model: Any, tokens: Tensor, random: Random) -> Pair:
    """Token by token, also after the weights were changed through ``.data``."""
    ones = [1] * tokens.shape[1]
    in_pieces(model, tokens, ones)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    return in_pieces(model, tokens, ones)[0], whole(model, tokens)


def beams(model: Any, tokens: Tensor, random: Random) -> Pair:
    """Sequences that are reordered, some of them twice, some gone."""
    first = random.randint(1, tokens.shape[1] - 1)
    _, cache = in_pieces(model, tokens[:, :first], _sizes(random, first))
    order = torch.tensor([random.randrange(len(tokens)) for _ in tokens])
    cache.reorder_cache(order)
    rest = tokens.shape[1] - first
    found, _ = in_pieces(model, tokens[order, first:], _sizes(random, rest), cache)
    return found, whole(model, tokens[order])[:, first:]


def taken_back(model: Any, tokens: Tensor, random: Random) -> Pair:
    """Tokens that are taken back, and others in their place."""
    count = random.randint(1, tokens.shape[1] - 1)
    _, cache = in_pieces(model, tokens, _sizes(random, tokens.shape[1]))
    cache.crop(-count)
    other = torch.cat([tokens[:, :-count], (tokens[:, -count:] + 1).clamp(max=55)], 1)
    return in_pieces(model, other[:, -count:], _sizes(random, count), cache)[0], whole(model, other)[:, -count:]


def padding(model: Any, tokens: Tensor, random: Random) -> Pair:
    """Padding on either side; encoders know positions, so that theirs is on the right."""
    count, pads = random.randint(1, 4), torch.full((len(tokens), 4), 13)
    ones = torch.ones_like(tokens)
    right = random.random() < 0.5 or "position_ids" not in inspect.signature(model.forward).parameters
    if right or "MaskedLM" in type(model).__name__:
        mask = torch.cat([ones, 0 * pads[:, :count]], 1)
        found = whole(model, torch.cat([tokens, pads[:, :count]], 1), attention_mask=mask)
        return found[:, : tokens.shape[1]], whole(model, tokens)
    mask = torch.cat([0 * pads[:, :count], ones], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = whole(model, torch.cat([pads[:, :count], tokens], 1), attention_mask=mask, position_ids=positions)
    return found[:, count:], whole(model, tokens)


def rows(model: Any, tokens: Tensor, random: Random) -> Pair:
    """Each sequence by itself."""
    return torch.cat([whole(model, row[None]) for row in tokens]), whole(model, tokens)


def generated(model: Any, tokens: Tensor, random: Random) -> Pair:
    """Generation with and without a cache."""
    more: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    how = random.choice(({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}))
    plain = {} if "cache_implementation" in how else how
    first = model.generate(tokens, **more, **how).double()
    return first, model.generate(tokens, **more, **plain, use_cache=False).double()


def threads(model: Any, tokens: Tensor, random: Random) -> Pair:
    """Several threads, each with a text and a mask of its own."""
    texts = [(tokens + k).clamp(max=55)[:, : max(2, tokens.shape[1] - k)] for k in range(4)]
    masks = [torch.ones_like(text) for text in texts]
    for k, mask in enumerate(masks):
        mask[:, mask.shape[1] - k % 2 :] = 0

    @torch.no_grad()
    def answer(k: int) -> Tensor:
        return torch.cat([whole(model, texts[k], attention_mask=masks[k])[:, 0] for _ in range(3)])

    alone = torch.cat([answer(k) for k in range(4)])
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            return torch.cat(list(pool.map(answer, range(4)))), alone
    finally:
        sys.setswitchinterval(before)


@torch.enable_grad()
def checkpointing(model: Any, tokens: Tensor, random: Random) -> Pair:
    """Gradients of layers that are computed again."""
    mask = torch.ones_like(tokens)
    mask[0, -2:] = 0

    def gradients() -> Tensor:
        model.zero_grad()
        (whole(model.train(), tokens, attention_mask=mask) * mask[..., None]).square().mean().backward()
        found = [each.grad.flatten() for each in model.parameters() if each.grad is not None]
        return torch.cat(found)

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": random.random() < 0.5})
    return gradients(), plain


WAYS: dict[str, Callable[[Any, Tensor, Random], Pair]] = {
    "chunks": chunks,
    "one by one": one_by_one,
    "beams": beams,
    "taken back": taken_back,
    "padding": padding,
    "rows": rows,
    "generated": generated,
    "threads": threads,
    "checkpointing": checkpointing,
}
