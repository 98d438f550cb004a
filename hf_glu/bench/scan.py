"""The recurrence of stateful gates beside autograd through a loop, and an FFN with states beside one without.

Pairs: B = 4, T = 512, W = 2048; the FFN is Llama's, 768 -> 2048 -> 768.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hf_glu.activation import registry
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.activation.kernels.scan import stateful
from hf_glu.activation.module import OwnedActivation
from hf_glu.bench.options import Shape
from hf_glu.bench.running import DTYPES, BenchOptions, Cell, Claim, Contender
from hf_glu.bench.steps import llama_ffns, trained
from hf_glu.config.glu import GluConfig

BATCH, TOKENS, HIDDEN, WIDTH = 4, 512, 768, 2048
SHORT, LONG = 2048, 16_384  # tokens of which the cost of one is compared
LOOP, SCAN = "autograd, loop over unbind", "hf_glu.scan"
PLAIN, STATEFUL = "swiglu", "stateful_swiglu"


def cells(options: BenchOptions) -> Iterator[Cell]:
    """Yield the recurrence by itself, the FFN, and the cost of a token in short and long texts."""
    width = options.width or WIDTH
    for tokens in options.sizes((TOKENS,)):
        shape: Shape = {
            "pass": "forward + backward",
            "batch": BATCH,
            "tokens": tokens,
            "width": width,
            "dtype": options.dtype,
        }
        claims = {SCAN: Claim(peers=(LOOP,), target=0.8, saved_peers=(LOOP,), saved_target=0.5)}
        yield Cell(shape={"of": "recurrence", **shape}, build=partial(recurrence, shape), claims=claims)
        whole: Shape = {"of": "FFN", "hidden": options.hidden or HIDDEN, **shape}
        claims = {STATEFUL: Claim(peers=(PLAIN,), target=1.25, saved_peers=(PLAIN,))}
        yield Cell(shape=whole, build=partial(ffns, whole), claims=claims)
    if options.tokens is None:
        each: Shape = {
            "of": "cost of a token",
            "pass": "forward + backward",
            "batch": 1,
            "width": width,
            "dtype": options.dtype,
        }
        short, long = (f"{tokens:,} tokens, {LONG:,} in all" for tokens in (SHORT, LONG))
        claims = {long: Claim(peers=(short,), target=1.5)}
        yield Cell(shape=each, build=partial(lengths, each, short, long), claims=claims)


def unbound(gate: Tensor, alpha: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """Compute z by a loop over tokens that autograd follows."""
    openness = gate.sigmoid()
    state, found = torch.zeros_like(gate[:, 0]), []
    for g, n in zip(gate.unbind(1), openness.unbind(1), strict=True):
        found.append(g + alpha * state + beta * (n - state))
        state = decay * state + (1 - decay) * n
    return torch.stack(found, 1)


def _scanned(*arguments: Tensor) -> Tensor:
    return stateful(*arguments)[0]


def _inputs(shape: Shape, tokens: int) -> list[Tensor]:
    torch.manual_seed(0)
    width, dtype = shape["width"], DTYPES[shape["dtype"]]
    gate = torch.randn(shape["batch"], tokens, width).to(dtype)
    decay = torch.rand(width).mul(0.49).add(0.5)
    return [t.requires_grad_() for t in (gate, torch.randn(width), torch.randn(width), decay)]


def _step(function: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor) -> None:
    for tensor in inputs:
        tensor.grad = None
    function(*inputs).backward(gradient.to(inputs[0].dtype))


def recurrence(shape: Shape) -> dict[str, Contender]:
    """Return the loop and the scan on the same inputs."""
    inputs = _inputs(shape, shape["tokens"])
    gradient = torch.randn(inputs[0].shape)
    own = tuple(inputs)
    return {
        name: Contender(
            call=partial(_step, function, inputs, gradient), forward=partial(function, *inputs), parameters=own
        )
        for name, function in ((LOOP, unbound), (SCAN, _scanned))
    }


def lengths(shape: Shape, short: str, long: str) -> dict[str, Contender]:
    """Return contenders that run the same number of tokens as short and as long sequences."""

    def steps(inputs: list[Tensor], gradient: Tensor, times: int) -> None:
        for _ in range(times):
            _step(_scanned, inputs, gradient)

    made = {}
    for name, tokens in ((short, SHORT), (long, LONG)):
        inputs = _inputs(shape, tokens)
        made[name] = Contender(call=partial(steps, inputs, torch.randn(inputs[0].shape), LONG // tokens))
    return made


def ffns(shape: Shape) -> dict[str, Contender]:
    """Build Llama's FFN with and without a state, with the same weights."""
    torch.manual_seed(0)
    gate = registry["stateful_silu"].factory()
    assert isinstance(gate, OwnedActivation)
    gate.configure(GluConfig(state={"alpha": 0.5, "beta": 0.5}), shape["width"])
    gates = {PLAIN: build_elementwise("silu"), STATEFUL: gate}
    dtype, made = DTYPES[shape["dtype"]], llama_ffns(gates, shape["hidden"], shape["width"])
    x = torch.randn(shape["batch"], shape["tokens"], shape["hidden"]).to(dtype).requires_grad_()
    return trained({name: module.to(dtype) for name, module in made.items()}, x)
