"""Models that read the text, however it reaches them: whole, in pieces, padded, in beams, from several threads.

A way gives two answers that must be the same. What the stock model can't do either in that way is not held against the
converted one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import hf_glu
from hf_glu.errors import HfGluError

from . import models
from .activations import causal, constants_of, copies, draw_name, draw_options, formula_of, stir
from .conversions import quiet, written
from .formulas import Name, running_mean
from .models import Source
from .running import Tally, main
from .ways import WAYS, whole

TINY = ("mistral", "gemma2", "qwen3", "phi", "gptj", "bloom", "starcoder2", "olmo2", "falcon", "gpt_bigcode", "biogpt")
DECODERS = (
    *(
        Source("pico", family, head)
        for family, head in (("gpt2", None), ("opt", None), ("gpt_neox", None), ("t5", None), ("bart", None))
    ),
    *(Source("native", family) for family in ("llama", "phi3", "t5_v1_1")),
)
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
        way: of `WAYS`, or ``gates``: every gate is compared with its formula.
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
    way = random.choice(["gates", *sorted(WAYS)])
    encodes = way in ("padding", "rows", "gates", "threads", "checkpointing") and random.random() < 0.4
    source = random.choice(ENCODERS if encodes else DECODERS)
    if not encodes and random.random() < 0.3:
        source = Source("tiny", random.choice(TINY))
    name = draw_name(random)
    name = replace(name, base="own", wrappers=name.wrappers or (random.choice(("stateful_", "modulated_")),))
    options = {key: value for key, value in draw_options(random, name, 8).items() if key != "mix"}
    name = replace(name, functions=())
    if not encodes:
        causal(options)
    if random.random() < 0.25 and way != "gates":
        options |= {"experts": random.choice((2, 3)), "top_k": random.choice((1, 2))}
    if "modulated_" in name.wrappers and random.random() < 0.3:
        options["context"] = {"size": 3, "layer": random.choice((0, 1))}
    return Case(
        source=replace(source, seed=random.randrange(100)),
        name=name,
        options=options,
        way=way,
        batch=random.choice((1, 2, 3)),
        length=random.randint(4, 14),
        dtype=torch.float64 if random.random() < 0.7 else torch.float32,
        seed=random.randrange(10**6),
    )


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


def gates(case: Case, model: Any, tokens: Tensor, random: Random) -> Tally:
    """Compare what every gate of a model gives with the formula, padding and context vector included."""
    tally, seen, mask = Tally(), {}, torch.ones_like(tokens)
    mask[0, -random.randint(1, 2) :] = 0
    sites = [site for site in hf_glu.find_sites(model) if site.activation or site.native]
    sources = {name: each for name, each in model.named_modules() if type(each).__name__ == "ContextSource"}
    if model.config.is_encoder_decoder or len(sources) > 1:
        return tally
    handles = [
        site.act.register_forward_hook(lambda m, x, y, k=k: seen.update({k: (x[0], y)})) for k, site in enumerate(sites)
    ]
    for name in sources:
        block = model.get_submodule(name.rpartition(".")[0])
        handles.append(
            block.register_forward_pre_hook(
                lambda m, args, kwargs: seen.update(h=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        )
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
