"""Whole models: a fine-tuning step of a BERT of MiniLM's shape, and decoding with a Llama of SmolLM-135M's.

Weights are random: times don't depend on them. A fine-tuning step is forward, backward and AdamW on 32 texts of 32
tokens; decoding is a prompt of 16 tokens and then 32 tokens, one after the other, with the cache, batch 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import hf_glu
from hf_glu.activation.kernels.compiled import has_compiler
from hf_glu.bench.decoding import cache_in
from hf_glu.bench.options import Shape
from hf_glu.bench.running import DTYPES, BenchOptions, Cell, Claim, Contender
from hf_glu.compat.of_models import EXPERTS_IMPLEMENTATION
from hf_glu.ffn.experts.ffn import find_experts
from hf_glu.ffn.experts.group import banks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BERT = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
LLAMA = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
BATCH, LENGTH, PROMPT, NEW = 32, 32, 16, 32
EXPERTS, TOP_K, LAYERS = 8, 2, 6  # of the models with experts, which have fewer layers
DENSE, FULL, ISO, LEAN = "dense gelu", "geglu, width kept", "swiglu, iso width", "swiglu, iso width, save_memory"
FUSED = f"{FULL}, fused"
STOCK = "stock Llama"
MIXTRALS = tuple(f"stock Mixtral, {name}" for name in ("grouped_mm", "eager"))
MIXED = "swiglu*2,geglu*2,reglu*2,glu*2"


def cells(options: BenchOptions) -> Iterator[Cell]:
    """Yield cells for a fine-tuning step, decoding, and decoding with experts."""
    steps: Shape = {"of": "BERT, MiniLM's shape", "pass": "fine-tuning step"}
    decoded: Shape = {"of": "Llama, SmolLM-135M's shape"}
    more: Shape = {"dtype": options.dtype}
    ratio = parameter_ratio()
    yield Cell(
        shape={**steps, "batch": BATCH, "tokens": LENGTH, **more, "memory": "peak"},
        build=partial(bert_steps, options.dtype),
        claims={
            ISO: Claim(peers=(DENSE,), target=1.05, saved_peers=(DENSE,), saved_target=1.0),
            LEAN: Claim(peers=(DENSE,), target=1.05, saved_peers=(DENSE,), saved_target=1.0),
            FULL: Claim(peers=(DENSE,), target=round(ratio, 3), saved_peers=(DENSE,)),
            FUSED: Claim(peers=(DENSE,), target=round(ratio, 3), saved_peers=(DENSE,)),
        },
    )
    yield Cell(
        shape={**decoded, "pass": "decode", "tokens": NEW, **more},
        build=partial(llamas, options.dtype),
        claims={"swiglu": Claim(peers=(STOCK,), target=1.02), "stateful_swiglu": Claim(peers=(STOCK,), target=1.10)},
    )
    yield Cell(
        shape={"of": f"{EXPERTS} experts, top {TOP_K}", "layers": LAYERS, "pass": "decode", "tokens": NEW, **more},
        build=partial(mixtrals, options.dtype),
        claims={MIXED: Claim(peers=MIXTRALS, target=1.0)},
    )


def make_bert(activation: str, width: str | None = None) -> PreTrainedModel:
    """Build a BERT of MiniLM's shape with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(**BERT, hidden_act=activation)
    config.hf_glu = {"width": width} if width else None
    return BertForSequenceClassification(config)


def parameter_ratio() -> float:
    """Return the ratio of parameters of a BERT with geglu at the dense width to those of the dense BERT."""
    with torch.device("meta"):
        dense, full = (make_bert(name).num_parameters() for name in ("gelu", "geglu"))
    return float(full / dense)


def bert_steps(dtype: str) -> dict[str, Contender]:
    """Return a fine-tuning step of each model."""
    models = {
        DENSE: make_bert("gelu"),
        FULL: make_bert("geglu"),
        FUSED: make_bert("geglu"),
        ISO: make_bert("swiglu", "iso"),
        LEAN: make_bert("swiglu", "iso"),
    }
    hf_glu.save_memory(models[LEAN])
    if has_compiler("cpu"):
        hf_glu.fuse(models[FUSED])
    ids = torch.randint(5, 20000, (BATCH, LENGTH))
    labels = torch.randint(0, 2, (BATCH,))
    return {name: _step(model.train().to(DTYPES[dtype]), ids, labels) for name, model in models.items()}


def _step(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Contender:
    optimizer = torch.optim.AdamW(hf_glu.parameter_groups(model, 1e-5, 0.01))

    def loss() -> Tensor:
        found: Tensor = model(input_ids=ids, labels=labels).loss
        return found

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contender(call=step, peak=True)


def llamas(dtype: str) -> dict[str, Contender]:
    """Return contenders that decode with a stock Llama and with ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = {}
    for name in (STOCK, "swiglu", "stateful_swiglu"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
        if name != STOCK:
            hf_glu.convert(model, name, check=False)
        made[name] = model
    return {name: Contender(call=partial(decode, model.to(DTYPES[dtype]))) for name, model in made.items()}


def mixtrals(dtype: str) -> dict[str, Contender]:
    """Return contenders that decode with a stock Mixtral, by each implementation of experts, and with our experts."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = {**LLAMA, "num_hidden_layers": LAYERS}
    made = {}
    for name in MIXTRALS:
        config = MixtralConfig(**sizes, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K)
        EXPERTS_IMPLEMENTATION.put(config, name.rpartition(", ")[2])
        torch.manual_seed(0)
        made[name] = MixtralForCausalLM(config).eval()
    ours = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    hf_glu.convert(ours, "swiglu", experts=MIXED, top_k=TOP_K, check=False)
    assert sum(group.count for ffn in find_experts(ours).values() for group in banks_of(ffn.banks)) == EXPERTS * LAYERS
    made[MIXED] = ours
    return {name: Contender(call=partial(decode, model.to(DTYPES[dtype]))) for name, model in made.items()}


@torch.no_grad()
def decode(model: PreTrainedModel) -> None:
    """Read a prompt, and write tokens one after the other."""
    tokens = torch.arange(5, 5 + PROMPT, device=model.device).unsqueeze(0)
    cache: dict[str, Any] = {}
    for _ in range(NEW):
        out = model(input_ids=tokens, **cache, use_cache=True)
        tokens, cache = out.logits[:, -1:].argmax(-1), cache_in(out)
