"""Our gated FFN, one in-projection ``[gate | up]``, beside stock's with two, and a dense one of equal parameters.

Pairs: T tokens, widths (H, W); forward and backward pass. ``save_memory`` is `hf_glu.save_memory`, ``fused`` is
`hf_glu.fuse`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation import registry
from hf_glu.activation.kernels.compiled import has_compiler
from hf_glu.bench.options import Shape
from hf_glu.bench.running import DTYPES, BenchOptions, Cell, Claim, Contender
from hf_glu.bench.steps import llama_ffns, trained
from hf_glu.ffn.lean import fuse, keep_less

WIDTHS, TOKENS = ((384, 1024), (768, 2048), (2048, 5504)), (256, 1024, 4096)
COMPILED_WIDTH = (768, 2048)  # compiling takes longer than measuring
LARGEST = 1024 * 2048 * 5504  # tokens x hidden x width of a cell that is measured
STOCK, T5, COMPILED, DENSE = "stock LlamaMLP", "stock T5", "compiled LlamaMLP", "dense GELU, as many parameters"
CLAIMS = {
    "swiglu": Claim(peers=(STOCK,), target=1.03, saved_peers=(STOCK,)),
    "swiglu, save_memory": Claim(peers=(STOCK,), target=1.03, saved_peers=(STOCK,), saved_target=0.65),
    "swiglu, fused": Claim(peers=(STOCK,), target=1.03, saved_peers=(STOCK,)),
    "swiglu, fused, save_memory": Claim(peers=(STOCK,), target=1.03, saved_peers=(STOCK,), saved_target=0.65),
    "geglu_new, fused": Claim(peers=(T5,), target=1.03, saved_peers=(T5,)),
    "geglu_new, save_memory": Claim(peers=(T5,), target=1.03, saved_peers=(T5,), saved_target=0.65),
}
BESIDE = {
    "swiglu, fused, to dense": Claim(peers=(DENSE,), target=1.05),
    "swiglu, fused, to compiled": Claim(peers=(COMPILED,), target=1.0),
}
MEANS = dict.fromkeys(CLAIMS, 0.97)


class FusedFFN(nn.Module):
    """The gated FFN of a converted model: out(act(in(x))), where in(x) is ``[g | u]``."""

    def __init__(self, hidden: int, width: int, name: str, weights: tuple[Tensor, Tensor, Tensor]) -> None:
        super().__init__()
        self.in_proj = nn.Linear(hidden, 2 * width, bias=False)
        self.out_proj = nn.Linear(width, hidden, bias=False)
        self.act = registry[name].factory()
        gate, up, out = (weight.detach() for weight in weights)
        self.in_proj.weight = nn.Parameter(torch.cat([gate, up]))
        self.out_proj.weight = nn.Parameter(out.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the FFN."""
        out: Tensor = self.out_proj(self.act(self.in_proj(x)))
        return out


def cells(options: BenchOptions) -> Iterator[Cell]:
    """Yield a cell for each width and number of tokens, without the largest products."""
    given = options.hidden is not None or options.width is not None
    widths = ((options.hidden or 768, options.width or 2048),) if given else WIDTHS
    for hidden, width in widths:
        for tokens in options.sizes(TOKENS):
            if options.tokens is None and tokens * hidden * width > LARGEST:
                continue
            shape: Shape = {
                "of": "gated FFN",
                "pass": "forward + backward",
                "tokens": tokens,
                "hidden": hidden,
                "width": width,
                "dtype": options.dtype,
            }
            yield Cell(shape=shape, build=partial(ffns, shape), claims=CLAIMS | BESIDE)


def ffns(shape: Shape) -> dict[str, Contender]:
    """Build the contenders; stock's and ours have the same weights."""
    torch.manual_seed(0)
    hidden, width, dtype = shape["hidden"], shape["width"], DTYPES[shape["dtype"]]
    stock: Any = llama_ffns({STOCK: nn.SiLU()}, hidden, width)[STOCK]
    t5, made = _t5(hidden, width), dict[str, Any]()
    llama = (stock.gate_proj.weight, stock.up_proj.weight, stock.down_proj.weight)
    weights = {"swiglu": llama, "geglu_new": (t5.wi_0.weight, t5.wi_1.weight, t5.wo.weight)}
    for key in CLAIMS:
        name, *ways = key.split(", ")
        made[key] = FusedFFN(hidden, width, name, weights[name])
        if "save_memory" in ways:
            keep_less(made[key].act, made[key].out_proj)
        if "fused" in ways and has_compiler("cpu"):
            fuse(made[key])
    made |= {"swiglu, fused, to dense": made["swiglu, fused"], STOCK: stock, T5: t5, DENSE: _dense(hidden, width)}
    made = {key: module.to(dtype) for key, module in made.items()}
    if (hidden, width) == COMPILED_WIDTH and has_compiler("cpu"):
        made |= {COMPILED: torch.compile(stock), "swiglu, fused, to compiled": made["swiglu, fused"]}
    x = torch.randn(1, shape["tokens"], hidden).to(dtype).requires_grad_()
    return trained(made, x)


def _t5(hidden: int, width: int) -> Any:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

    return T5DenseGatedActDense(T5Config(d_model=hidden, d_ff=width, dropout_rate=0.0, feed_forward_proj="gated-gelu"))


def _dense(hidden: int, width: int) -> nn.Module:
    wider = 3 * width // 2
    return nn.Sequential(nn.Linear(hidden, wider, bias=False), nn.GELU(), nn.Linear(wider, hidden, bias=False))
