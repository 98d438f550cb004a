"""Models that read the text, however it reaches them: whole, in pieces, padded, in beams, from several threads.

A way gives two answers that must be the same. What the stock model can't do either in that way is not held against the
converted one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import hf_glu
from hf_glu.errors import HfGluError

from . import models
from .activations import constants_of, copies, draw_name, draw_options, formula_of, stir
from .conversions import quiet, written
from .formulas import Name, running_mean
from .models import Source
from .running import Tally, main

TINY = ("mistral", "gemma2", "qwen3", "phi", "gptj", "bloom", "starcoder2", "olmo2", "falcon", "gpt_bigcode", "biogpt")
DECODERS = (
    *(Source("pico", family, head) for family, head in
      (("gpt2", None), ("opt", None), ("gpt_neox", None), ("t5", None), ("bart", None))),
    *(Source("native", family) for family in ("llama", "phi3", "t5_v1_1")),
)  # fmt: skip
ENCODERS = (
    *(Source("pico", family, None) for family in ("bert", "roberta", "distilbert", "electra")),
    Source("native", "modernbert"),
)
MOST = {torch.float64: 1e-10, torch.float32: 2e-4}
GAIN = 3.0  # pico models say nearly nothing


@dataclass(frozen=True)
class Case:
    """One model and one way of giving it a text.

    Attributes:
        source: the dense model.
        name, options: what it is converted to.
        way: of `WAYS`.
        batch, length: of the text.
        dtype: of the model.
        seed: of everything random.
    """

    source: Source
    name: Name
    options: dict[str, Any]
    way: str
    batch: int
    length: int
    dtype: torch.dtype
    seed: int


def draw(random: Random) -> Case:
    """Return any case."""
    way = random.choice(sorted(WAYS))
    encodes = way in ("padding", "rows", "gates", "threads", "checkpointing") and random.random() < 0.4
    source = random.choice(ENCODERS if encodes else DECODERS)
    if not encodes and random.random() < 0.3:
        source = Source("tiny", random.choice(TINY))
    name = draw_name(random)
    name = replace(name, base="own", wrappers=name.wrappers or (random.choice(("stateful_", "modulated_")),))
    options = {key: value for key, value in draw_options(random, name, 8).items() if key != "mix"}
    name = replace(name, functions=())
    if not encodes:
        options.pop("state", None)
    if random.random() < 0.25 and way != "gates":
        options |= {"experts": random.choice((2, 3)), "top_k": random.choice((1, 2))}
    if "modulated_" in name.wrappers and random.random() < 0.3:
        options["context"] = {"size": 3, "layer": random.choice((0, 1))}
    return Case(
        source=replace(source, seed=random.randrange(100)), name=name, options=options, way=way,
        batch=random.choice((1, 2, 3)), length=random.randint(4, 14),
        dtype=torch.float64 if random.random() < 0.7 else torch.float32, seed=random.randrange(10**6),
    )  # fmt: skip


def prepare(case: Case, *, converted: bool) -> Any:
    """Return the model with loud weights, and constants that do something."""
    model = models.make(case.source)
    torch.manual_seed(case.seed)
    if converted:
        hf_glu.convert(model, written(case.name, models.own_activation(model)), check=False, **case.options)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(GAIN)
    for site in hf_glu.find_sites(model):
        if converted and isinstance(site.act, nn.Module):
            stir(site.act, case.seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.to(case.dtype).eval()


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


Pair = tuple[Tensor, Tensor]


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
    "gates": lambda model, tokens, random: (tokens, tokens),
}


def gates(case: Case, model: Any, tokens: Tensor, random: Random) -> Tally:
    """Compare what every gate of a model gives with the formula, padding and context vector included."""
    tally, seen, mask = Tally(), {}, torch.ones_like(tokens)
    mask[0, -random.randint(1, 2) :] = 0
    sites = [site for site in hf_glu.find_sites(model) if site.activation or site.native]
    sources = {name: each for name, each in model.named_modules() if type(each).__name__ == "ContextSource"}
    if model.config.is_encoder_decoder or len(sources) > 1:
        return tally
    handles = [site.act.register_forward_hook(lambda m, x, y, k=k: seen.update({k: (x[0], y)}))
               for k, site in enumerate(sites)]  # fmt: skip
    for name in sources:
        block = model.get_submodule(name.rpartition(".")[0])
        handles.append(block.register_forward_pre_hook(
            lambda m, args, kwargs: seen.update(h=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        ))  # fmt: skip
    whole(model, tokens, attention_mask=mask)
    for handle in handles:
        handle.remove()
    dense, valid, vector = models.own_activation(models.make(case.source)), mask.bool(), None
    for source in sources.values():
        openness = torch.sigmoid(seen["h"].double() @ source.weight.double().T)
        if source.pool == "running":
            vector = running_mean(openness, torch.sigmoid(source.decay.double()), valid)
        else:
            vector = (openness * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
    layer = (case.options.get("context") or {}).get("layer", 0)
    for k, site in enumerate(sites):
        x, y = (each.reshape(*tokens.shape, -1)[valid.any(1)] for each in seen[k])
        base = dense if site.native else written(replace(case.name, wrappers=(), mix=""), dense)
        formula = formula_of(replace(case.name, base=base), case.options)
        constants = {key: value.detach() for key, value in constants_of(copies(site.act, torch.float64)).items()}
        own = vector if site.layer >= layer else None
        right = formula(x.double(), constants, valid=valid, vector=own)[0]
        tally.close(f"gate {site.name}", y[valid], right[valid], right[valid].to(case.dtype), case.dtype)
    return tally


@torch.no_grad()
def check(case: Case) -> Tally:
    """Compare the two answers of a way."""
    tally = Tally()
    try:
        model = prepare(case, converted=True)
    except HfGluError:
        return Tally(refused=1)
    tokens = torch.randint(20, 55, (case.batch, case.length), generator=torch.Generator().manual_seed(case.seed))
    if case.way == "gates":
        return gates(case, model, tokens, Random(case.seed))
    try:
        got, right = WAYS[case.way](model, tokens, Random(case.seed))
        tally.same(case.way, got, right, MOST[case.dtype])
    except Exception as error:
        tally.expect(False, f"{case.way}: {type(error).__name__}: {str(error)[:300]}")
    if tally.bad and not _stock_can(case, tokens):
        return Tally(undecided=1)
    return tally


def _stock_can(case: Case, tokens: Tensor) -> bool:
    """Tell whether the two answers of the stock model are the same."""
    control = Tally()
    try:
        got, right = WAYS[case.way](prepare(case, converted=False), tokens, Random(case.seed))
    except Exception:
        return False
    control.same(case.way, got, right, MOST[case.dtype])
    return not control.bad


if __name__ == "__main__":
    quiet()
    main("decoding", draw, check, 600)
