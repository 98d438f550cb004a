"""Decoding with ReLU gates: an FFN that skips closed units beside one that doesn't; or a whole model, see `decoding`.

One token, one FFN of (H, W); the gate's bias is set so that a given share of the units is closed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.bench.options import Shape
from hf_glu.bench.running import DTYPES, BenchOptions, Cell, Claim, Contender

HIDDEN, WIDTH = 2048, 5504
CLOSED = (0.5, 0.8, 0.9, 0.95)
# share of closed units -> the largest ratio. Reading (1 + 2 a) / 3 of the weights would give 0.67, 0.47, 0.40, 0.37;
# an FFN that finds too many units open goes on as usual, and has lost little
TARGETS = {0.5: 1.05, 0.8: 1.0, 0.9: 1.0, 0.95: 1.0}


def cells(options: BenchOptions) -> Iterator[Cell]:
    """Yield a cell for each share of closed units; with ``--model`` that of the model instead."""
    if options.model:
        from hf_glu.bench.decoding import model_cells

        yield from model_cells(options)
        return
    for closed in CLOSED:
        shape: Shape = {
            "of": "reglu FFN",
            "pass": "decode",
            "closed": closed,
            "tokens": 1,
            "hidden": options.hidden or HIDDEN,
            "width": options.width or WIDTH,
            "dtype": options.dtype,
        }
        yield Cell(
            shape=shape,
            build=partial(ffns, shape),
            claims={"skip_zeros": Claim(peers=("dense",), target=TARGETS[closed])},
        )


def ffns(shape: Shape) -> dict[str, Contender]:
    """Build Llama's FFN twice, with the same weights; one skips closed units."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    from hf_glu.ffn.sparse import skip_zeros

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["width"],
        num_attention_heads=1,
        hidden_act="relu",
        mlp_bias=True,
    )
    x = torch.randn(1, 1, shape["hidden"]).to(DTYPES[shape["dtype"]])
    holder = nn.ModuleDict({"mlp": LlamaMLP(config)}).to(x.dtype).eval()
    dense = nn.ModuleDict({"mlp": LlamaMLP(config)}).to(x.dtype).eval()
    for parameter in dense.parameters():
        parameter.data.normal_(std=0.02)
    with torch.no_grad():
        gate: Any = dense["mlp"].gate_proj
        values = nn.functional.linear(x, gate.weight)[0, 0].float()
        gate.bias.fill_(-float(values.quantile(shape["closed"])))
    holder.load_state_dict(dense.state_dict())
    skip_zeros(holder)

    @torch.no_grad()
    def step(module: Any) -> Tensor:
        out: Tensor = module["mlp"](x)
        return out

    return {"dense": Contender(call=partial(step, dense)), "skip_zeros": Contender(call=partial(step, holder))}
