"""The variants of the studies that train language models from scratch: a row is the config of a model."""

from __future__ import annotations

from typing import Any

from recipes.evidence.presets import BLOCK, Size

Config = dict[str, Any]
GATED = ("swiglu", "geglu", "reglu", "bilinear")
PLAIN = ("gelu", "relu2", "xielu", "polynorm")
EXPERTS = 8
# activations of the experts (of which a gated one is narrower), and how many a token uses
MIXTURES: dict[str, tuple[tuple[str, ...], int]] = {
    "swiglu top-2": (("swiglu",), 2),  # the first: its learning rate is all the others'
    "silu top-2": (("silu",), 2),
    "relu2 top-2": (("relu2",), 2),
    "relu2glu top-2": (("relu2glu",), 2),
    "kappa_swiglu top-2": (("kappa_swiglu",), 2),
    "mixed top-2": (("relu2", "swiglu"), 2),
    "relu2 top-1": (("relu2",), 1),
    "swiglu top-1": (("swiglu",), 1),
    "relu2 top-4": (("relu2",), 4),
    "swiglu top-4": (("swiglu",), 4),
}
MEMORIES = ("swiglu", "stateful_swiglu", "canon_swiglu", "smear_swiglu")


def gated_width(hidden: int, width: int) -> int:
    """Return the width at which a gated FFN with biases has as many parameters as a dense one.

    ``3 H w + 2 w = 2 H W + W``: an in-projection twice as wide, with its biases, and an out-projection.
    """
    return round((2 * hidden + 1) * width / (3 * hidden + 2))


def dense(size: Size, activation: str = "gelu", width: int | None = None, **more: Any) -> Config:
    """Return the config of a GPT-NeoX whose blocks are sequential."""
    return {
        "model_type": "gpt_neox", "hidden_size": size.hidden, "num_hidden_layers": size.layers,
        "num_attention_heads": 4, "intermediate_size": width or 4 * size.hidden, "hidden_act": activation,
        "max_position_embeddings": BLOCK, "use_parallel_residual": False, "tie_word_embeddings": True,
        "vocab_size": size.vocabulary, **more,
    }  # fmt: skip


def llama(size: Size, activation: str, more_units: int = 0) -> Config:
    """Return the config of a Llama, which is gated by itself."""
    return {
        "model_type": "llama", "hidden_size": size.hidden, "num_hidden_layers": size.layers,
        "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_act": activation,
        "intermediate_size": round(8 / 3 * size.hidden) + more_units, "max_position_embeddings": BLOCK,
        "tie_word_embeddings": True, "vocab_size": size.vocabulary,
    }  # fmt: skip


def gates(size: Size) -> dict[str, Config]:
    """Return the rows of study (a), of equal parameters."""
    narrow = gated_width(size.hidden, 4 * size.hidden)
    return {name: dense(size, name) for name in PLAIN} | {name: dense(size, name, narrow) for name in GATED}


def experts(size: Size) -> dict[str, Config]:
    """Return the rows of study (b), of equal active parameters: but for kappa's, within 1 % (1.02 % at 0.3m)."""
    found = {}
    for row, (names, top_k) in MIXTURES.items():
        width = 4 * size.hidden // top_k
        groups = [f"{name}:{gated_width(size.hidden, width) if name.endswith('glu') else width}*{EXPERTS // len(names)}"
                  for name in names]  # fmt: skip
        # a name of ours, so that a stock Transformers can't take the experts for plain FFNs
        found[row] = dense(size, "swiglu", hf_glu={"experts": {"groups": ",".join(groups), "top_k": top_k}})
    return found


def memories(size: Size) -> dict[str, Config]:
    """Return the rows of study (d) on text; what they add, 1.04 % of a model at most, is shown."""
    return {name: llama(size, name) for name in MEMORIES}


def modulations(size: Size) -> dict[str, Config]:
    """Return the rows of study (e) on text: a unit has 3 H weights; a modulated channel 16 more, their source 8 H."""
    width = llama(size, "swiglu")["intermediate_size"]
    more = 16 * width * size.layers + 8 * size.hidden
    return {
        "swiglu": llama(size, "swiglu", round(more / (3 * size.hidden * size.layers))),
        "modulated_swiglu": llama(size, "modulated_swiglu"),
    }
