"""FFNs that take a long text a tile of tokens at a time, beside stock's: time, and the most memory at a time.

Pairs: T = 32,768 tokens, H = 768, W = 2,048; forward and backward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from hf_glu.bench.options import Shape
from hf_glu.bench.running import DTYPES, BenchOptions, Cell, Claim, Contender
from hf_glu.bench.steps import ffn_shape, llama_ffns
from hf_glu.ffn.lean import save_memory

TOKENS, HIDDEN, WIDTH, TILES = 32_768, 768, 2048, (1024, 4096)
STOCK = "stock LlamaMLP"


def cells(options: BenchOptions) -> Iterator[Cell]:
    """Yield a cell for each number of tokens."""
    claim = Claim(peers=(STOCK,), target=1.10, saved_peers=(STOCK,), saved_target=0.35)
    for tokens in options.sizes((TOKENS,)):
        shape = ffn_shape(options, tokens, HIDDEN, WIDTH)
        claims = {_name(TILES[0]): claim, _name(TILES[1]): Claim(peers=(STOCK,), saved_peers=(STOCK,))}
        yield Cell(shape=shape, build=partial(ffns, shape), claims=claims)


def _name(tile: int) -> str:
    return f"save_memory(tile={tile:,})"


def ffns(shape: Shape) -> dict[str, Contender]:
    """Build Llama's FFN, and copies of it that take tiles."""
    torch.manual_seed(0)
    stock = llama_ffns({STOCK: nn.SiLU()}, shape["hidden"], shape["width"])[STOCK].to(DTYPES[shape["dtype"]])
    made = {STOCK: nn.Sequential(stock)}
    for tile in TILES:
        made[_name(tile)] = copy.deepcopy(made[STOCK])
        save_memory(made[_name(tile)], tile=tile)
    x = torch.randn(1, shape["tokens"], shape["hidden"]).to(DTYPES[shape["dtype"]]).requires_grad_()
    d = torch.randn_like(x)
    return {name: Contender(call=partial(_step, ffn, x, d), peak=True) for name, ffn in made.items()}


def _step(ffn: nn.Module, x: Tensor, d: Tensor) -> None:
    ffn(x).backward(d)
    ffn.zero_grad()
    x.grad = None
