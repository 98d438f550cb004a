"""Our experts beside Mixtral's sparse MoE block, and with gates that hear the router: training steps and decoding.

Pairs: T tokens, H = 512, W = 1024, 8 experts, top-2; stock's ``gate_up_proj`` ``[8, 2 W, H]`` is our ``in_proj``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.bench.options import Shape
from hf_glu.bench.running import DTYPES, BenchOptions, Cell, Claim, Contender
from hf_glu.bench.steps import trained
from hf_glu.compat.of_models import EXPERTS_IMPLEMENTATION
from hf_glu.config.experts import ExpertOptions
from hf_glu.ffn.experts import ExpertFFN
from hf_glu.ffn.experts.group import banks_of
from hf_glu.ffn.lean import save_memory

HIDDEN, WIDTH, EXPERTS, TOP_K = 512, 1024, 8, 2
TRAINED, DECODED = (512, 1024, 2048, 4096), 4
COPIED = 2**30  # bytes: batched_mm copies an expert's weights for each pair, and is left out where they are more
STOCK = ("eager", "grouped_mm", "batched_mm")
OURS = {
    "homogeneous": "swiglu*8", "heterogeneous": "swiglu*2,geglu*2,reglu*2,glu*2", "hearing": "kappa_swiglu*8"
}  # fmt: skip
FREE, LEAN = "homogeneous, balance=0, z=0", "homogeneous, save_memory"
STD = 0.02

PEERS = tuple(f"stock {name}" for name in STOCK)
TRAINING = {
    "homogeneous": Claim(peers=PEERS, target=1.05, saved_peers=PEERS, saved_target=1.1),
    "heterogeneous": Claim(peers=("homogeneous",), target=1.10, saved_peers=PEERS, saved_target=1.1),
    FREE: Claim(peers=PEERS),
    LEAN: Claim(peers=PEERS, saved_peers=PEERS, saved_target=0.65),
    "hearing": Claim(peers=("homogeneous",), target=1.03),
}
DECODING = {name: Claim(peers=PEERS, target=1.05) for name in ("homogeneous", "heterogeneous")}
DECODING["hearing"] = TRAINING["hearing"]


def cells(options: BenchOptions) -> Iterator[Cell]:
    """Yield a training step for each number of tokens, then decoding."""
    shape: Shape = {
        "hidden": options.hidden or HIDDEN,
        "width": options.width or WIDTH,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "dtype": options.dtype,
    }
    for tokens in options.sizes(TRAINED):
        cell: Shape = {"pass": "forward + backward", "tokens": tokens, **shape}
        yield Cell(shape=cell, build=partial(training, cell), claims=TRAINING)
    cell = {"pass": "decode", "tokens": DECODED, **shape}
    yield Cell(shape=cell, build=partial(decoding, cell), claims=DECODING)


def modules(shape: Shape) -> dict[str, nn.Module]:
    """Build the modules of a cell, all with the same weights."""
    torch.manual_seed(0)
    weights = 3 * shape["hidden"] * shape["width"] * DTYPES[shape["dtype"]].itemsize
    skipped = {"batched_mm"} if shape["tokens"] * shape["top_k"] * weights > COPIED else set()
    made: dict[str, nn.Module] = {f"stock {name}": _stock(shape, name) for name in STOCK if name not in skipped}
    made |= {name: _ours(shape, groups) for name, groups in OURS.items()}
    if shape["pass"] != "decode":
        made[FREE] = _ours(shape, OURS["homogeneous"], balance=0.0, z=0.0)
        made[LEAN] = _ours(shape, OURS["homogeneous"])
        save_memory(made[LEAN])
    first = made[PEERS[0]]
    for parameter in first.parameters():
        parameter.data.normal_(std=STD)
    for module in made.values():
        _copy_weights(first, module)
    return {name: module.to(DTYPES[shape["dtype"]]) for name, module in made.items()}


def _stock(shape: Shape, implementation: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["width"],
        num_local_experts=shape["experts"],
        num_experts_per_tok=shape["top_k"],
    )
    EXPERTS_IMPLEMENTATION.put(config, implementation)
    return MixtralSparseMoeBlock(config)


def _ours(shape: Shape, groups: str, **more: float) -> nn.Module:
    options = ExpertOptions(groups=groups, top_k=shape["top_k"], **more)  # type: ignore[arg-type]
    return ExpertFFN(shape["hidden"], shape["width"], options, bias=False)


@torch.no_grad()
def _copy_weights(stock: Any, module: Any) -> None:
    if not isinstance(module, ExpertFFN):
        module.load_state_dict(stock.state_dict())
        return
    module.router.weight.copy_(stock.gate.weight)
    groups = banks_of(module.banks)
    sizes = [group.count for group in groups]
    halves = zip(stock.experts.gate_up_proj.split(sizes), stock.experts.down_proj.split(sizes), strict=True)
    for group, (in_proj, out_proj) in zip(groups, halves, strict=True):
        group.in_proj.copy_(in_proj)
        group.out_proj.copy_(out_proj)


def _input(shape: Shape) -> Tensor:
    return torch.randn(1, shape["tokens"], shape["hidden"]).to(DTYPES[shape["dtype"]])


def training(shape: Shape) -> dict[str, Contender]:
    """Return a training step of each: forward with the router's losses, backward into inputs and weights."""
    made = {name: module.train() for name, module in modules(shape).items()}
    return trained(made, _input(shape).requires_grad_())


def decoding(shape: Shape) -> dict[str, Contender]:
    """Return a forward pass of each on a few tokens."""
    x = _input(shape)

    @torch.no_grad()
    def step(module: nn.Module) -> None:
        module(x)

    return {name: Contender(call=partial(step, module.eval())) for name, module in modules(shape).items()}
