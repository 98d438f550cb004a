"""Pico models with states that do something, and what is asked of them: tokens, logits, ways to generate."""

from __future__ import annotations

from typing import Any

import torch
from pico import FAMILIES, make_native
from torch import Tensor

import hf_glu
from hf_glu.activation.stateful import Memory
from hf_glu.bench.decoding import cache_in

TARGET = {"t5_v1_1": "stateful_geglu_new", "modernbert": "stateful_geglu"}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order
GENERATE = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "beam": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


def make(name: str, **more: Any) -> Any:
    """Return a pico model, dense or native, by its family's name."""
    return FAMILIES[name].make(**more) if name in FAMILIES else make_native(name, **more)


def target_of(name: str) -> str:
    """Return the stateful activation that the family converts to exactly."""
    return f"stateful_{FAMILIES[name].exact}" if name in FAMILIES else TARGET.get(name, "stateful_swiglu")


def memories(model: Any) -> list[Memory]:
    """Return a model's states."""
    return [module for module in model.modules() if isinstance(module, Memory)]


def awake(name: str, seed: int = 1, **more: Any) -> Any:
    """Return a converted model whose states do something; ``name+experts`` has three experts, two for a token."""
    name, _, experts = name.partition("+")
    model = make(name)
    hf_glu.convert(model, target_of(name), check=False, **more, **({"experts": 3} if experts else {}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # louder: pico models say nearly nothing
            if parameter.ndim > 1:
                parameter.mul_(3)
        for memory in memories(model):
            memory.alpha.copy_(torch.randn(memory.alpha.shape, generator=generator) * 2)
            memory.beta.copy_(torch.randn(memory.beta.shape, generator=generator) * 2)
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
    return model.eval()


def ids(*shape: int, seed: int = 0) -> Tensor:
    """Return random token ids, none of them a special one."""
    return torch.randint(5, 60, shape, generator=torch.Generator().manual_seed(seed))


def batch(model: Any) -> dict[str, Tensor]:
    """Return inputs of four texts of ten tokens."""
    tokens = ids(4, 10)
    if model.config.is_encoder_decoder:
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    return {"input_ids": tokens}


def without_dropout(model: Any) -> Any:
    """Return the model, training, with nothing random and no cache."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    model.config.use_cache = False
    return model.train()


@torch.no_grad()
def logits(model: Any, tokens: Tensor, **more: Any) -> Tensor:
    """Return the logits of tokens; an encoder-decoder's, as its decoder's tokens after a source of its own."""
    if model.config.is_encoder_decoder:
        source = ids(len(tokens), 7, seed=9)
        more = {f"decoder_{key}" if key == "attention_mask" else key: value for key, value in more.items()}
        return model(input_ids=source, decoder_input_ids=tokens, **more).logits
    return model(input_ids=tokens, **more).logits


SPLITS = [(1,) * 12, (5, 7), (3, 1, 8)]
# Mamba's own state begins anew when several tokens continue a text
ONE_BY_ONE = [(1,) * 12, (5, *(1,) * 7)]


@torch.no_grad()
def whole_and_chunks(model: Any) -> tuple[Tensor, list[Tensor]]:
    """Return the logits of two texts at once, and in parts that the cache continues, for each way to divide them.

    There are no parts of a model that sees all tokens at once.
    """
    tokens, source = ids(2, 12), {"input_ids": ids(2, 7, seed=9)} if model.config.is_encoder_decoder else {}
    key = "decoder_input_ids" if source else "input_ids"
    whole, found = model(**source, **{key: tokens}), []
    splits = ONE_BY_ONE if hasattr(model.config, "state_size") else SPLITS
    for split in splits if cache_in(whole) else []:
        parts, cache = [], {}
        for part in tokens.split(split, dim=1):
            out = model(**source, **{key: part}, **cache, use_cache=True)
            cache = cache_in(out)
            parts.append(out.logits)
        found.append(torch.cat(parts, 1))
    return whole.logits, found


def one_by_one(model: Any, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Return the logits of a text that is given token by token, and its cache."""
    found = []
    for token in tokens.split(1, dim=1):
        with torch.no_grad():
            out = model(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1), cache
