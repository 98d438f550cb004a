"""What the activations compute, written out plainly and independently of hf_glu and of Transformers.

Every function works in the precision of its arguments: in float64 it is the reference, in a lower precision it shows
how much rounding the formula itself brings.

Shapes: B sequences, T tokens, W channels, K functions, R size of a context vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Constants = Mapping[str, Tensor]
WRAPPERS = ("modulated_", "canon_", "smear_", "stateful_")  # from the outside in
HEARING = ("kappa_",)  # inside of these, and inside of experts only
MIXES = ("learnable_", "moa_")
DEFAULT_FUNCTIONS = ("silu", "gelu", "relu", "tanh")


def _relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0)


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _softplus(x: Tensor) -> Tensor:
    return torch.where(x > 20, x, torch.log1p(torch.exp(torch.where(x > 20, 0, x))))


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _gelu_tanh(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _clipped_gelu(x: Tensor) -> Tensor:
    value = _gelu(x)
    return torch.where(value > 10, 10, value)


def _hardswish(x: Tensor) -> Tensor:
    return torch.where(x <= -3, 0, torch.where(x < 3, x * (x + 3) / 6, x))


def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    return torch.where(x > 0, x, weight * x)


def _xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: Tensor, eps: Tensor) -> Tensor:
    above = _softplus(alpha_p) * x * x + beta * x
    below = (beta + _softplus(alpha_n)) * (torch.expm1(torch.minimum(x, eps)) - x) + beta * x
    return torch.where(x > 0, above, below)


ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_10": _clipped_gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": lambda x: x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))) / 2,
    "gelu_accurate": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "hardswish": _hardswish,
    "laplace": lambda x: (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))) / 2,
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "linear": lambda x: x,
    "mish": lambda x: x * torch.tanh(_softplus(x)),
    "prelu": _prelu,
    "relu": _relu,
    "relu2": lambda x: _relu(x) ** 2,
    "relu6": lambda x: torch.where(x <= 0, 0, torch.where(x < 6, x, 6)),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "swish": lambda x: x * _sigmoid(x),
    "sqrtsoftplus": lambda x: torch.sqrt(_softplus(x)),
    "tanh": torch.tanh,
    "xielu": _xielu,
}
CONSTANTS = {"prelu": ("weight",), "xielu": ("alpha_p", "alpha_n", "beta", "eps")}
KINKS = {
    "gelu_10": (10.0,),
    "hardswish": (-3.0, 3.0),
    "leaky_relu": (0.0,),
    "prelu": (0.0,),
    "relu": (0.0,),
    "relu2": (0.0,),
    "relu6": (0.0, 6.0),
    "sqrtsoftplus": (20.0,),
    "mish": (20.0,),
    "xielu": (0.0,),
    "swiglu_oss": (-7.0, 7.0),
    "dreglu": (0.0,),
}
GATES = {
    "glu": "sigmoid",
    "bilinear": "linear",
    "reglu": "relu",
    "geglu": "gelu",
    "geglu_new": "gelu_new",
    "swiglu": "silu",
    "relu2glu": "relu2",
}


def _dreglu(g: Tensor, u: Tensor) -> Tensor:
    return torch.where((g > 0) & (u > 0), g * u, 0)


def _oss(g: Tensor, u: Tensor) -> Tensor:
    g = torch.where(g > 7, 7, g)
    u = torch.where(u > 7, 7, torch.where(u < -7, -7, u))
    return g * _sigmoid(1.702 * g) * (u + 1)


FORMULAS = {"dreglu": _dreglu, "swiglu_oss": _oss}  # which are no N(g) * u


@dataclass(frozen=True)
class Name:
    """An activation's name, made rather than parsed.

    Attributes:
        base: one of `GATES`, of `FORMULAS`, ``N_glu`` or an elementwise N.
        wrappers: from the outside in.
        mix: one of `MIXES`, or nothing.
        functions: the mix's dictionary, as its options have it (empty: the default).
    """

    base: str
    wrappers: tuple[str, ...] = ()
    mix: str = ""
    functions: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "".join(self.wrappers) + self.mix + self.base

    @property
    def gated(self) -> bool:
        """Whether it takes ``[g | u]``."""
        return self.base in GATES or self.base in FORMULAS or self.base.endswith("_glu")

    @property
    def elementwise(self) -> str:
        """N; of `FORMULAS` the name itself."""
        return GATES.get(self.base) or self.base.removesuffix("_glu")

    @property
    def dictionary(self) -> tuple[str, ...]:
        """The functions that are mixed."""
        own = self.elementwise
        given = self.functions or (own, *(name for name in DEFAULT_FUNCTIONS if name != own))
        return given if own in given else (*given, own)

    @property
    def kinks(self) -> tuple[float, ...]:
        """Where a derivative jumps."""
        parts = self.dictionary if self.mix else (self.elementwise,)
        return tuple(kink for part in parts for kink in KINKS.get(part, ()))


def evaluate(
    name: Name,
    x: Tensor,
    constants: Constants,
    *,
    kind: str = "softmax",
    directions: Mapping[str, str] | None = None,
    valid: Tensor | None = None,
    vector: Tensor | None = None,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the activation of ``x`` ``[..., W]`` or ``[..., 2 W]``, and what its N was given.

    Args:
        name: of the activation.
        x: its input; three dimensions are sequences, each row of fewer is one.
        constants: by name, those of a dictionary's functions as ``2.weight``, those of N itself as ``own.weight``,
            those of the first wrapper as ``0:alpha``.
        kind: ``softmax`` or ``linear``, of ``moa_``.
        directions: ``forward`` or ``both``, by wrapper.
        valid: ``[B, T]``, False at padding.
        vector: ``[B, T or 1, R]``, the context of ``modulated_``.
        scores: ``[...]``, what a router gives the one expert of ``kappa_``.
    """
    g, u = x.chunk(2, -1) if name.gated else (x, None)
    for number, wrapper in enumerate(name.wrappers):
        own = {key.partition(":")[2]: each for key, each in constants.items() if key.startswith(f"{number}:")}
        direction = (directions or {}).get(wrapper, "forward")
        if wrapper == "modulated_":
            g = g if vector is None else (g - vector @ own["threshold"].T) * (1 + vector @ own["slope"].T)
        elif wrapper == "kappa_":
            assert scores is not None
            g = g + g * (scores.to(g.dtype)[..., None] * own["response"][0])
        elif wrapper == "stateful_":
            g = remember(g, own["alpha"], own["beta"], _sigmoid(own["decay"]), direction, valid)
        else:
            g = beside(g, partial(RECENT[wrapper], **own), direction, valid)
    if name.base in FORMULAS:
        assert u is not None
        return FORMULAS[name.base](g, u), torch.cat([g, u], -1)
    y = mixed(name, g, constants, kind) if name.mix else plain(name.elementwise, g, constants, "own.")
    return y if u is None else y * u, g


def plain(function: str, x: Tensor, constants: Constants, prefix: str) -> Tensor:
    """Return N(x)."""
    return ELEMENTWISE[function](x, *(constants[prefix + key] for key in CONSTANTS.get(function, ())))


def mixed(name: Name, x: Tensor, constants: Constants, kind: str) -> Tensor:
    """Return sum_k a_k phi_k(x), a of each token for ``moa_``."""
    mix, annealed, functions = constants["mix"], constants["annealed"], name.dictionary
    total = torch.zeros_like(x)
    own = torch.zeros(len(functions), dtype=x.dtype)
    if name.mix == "moa_":
        seen = x @ constants["features"].T if "features" in constants else x
        scores = seen @ constants["choice"].T
        own = scores if kind == "linear" else torch.softmax(scores, -1) - 1 / len(functions)
    for k, function in enumerate(functions):
        target = float(function == name.elementwise)
        a = (1 - annealed) * (mix[k] + own[..., k, None]) + annealed * target
        total = total + a * plain(function, x, constants, f"{k}.")
    return total


def remember(
    g: Tensor, alpha: Tensor, beta: Tensor, decay: Tensor, direction: str = "forward", valid: Tensor | None = None
) -> Tensor:
    """Return g + alpha s + beta (sigmoid(g) - s), s the running mean of the gate's openness before each token."""
    sequences = g if g.ndim == 3 else g.reshape(-1, 1, g.shape[-1])
    n = _sigmoid(sequences)
    states = _states(n, decay, valid)
    if direction == "both":
        back = _states(n.flip(1), decay, None if valid is None else valid.flip(1)).flip(1)
        states = (states + back) / 2
    return (sequences + alpha * states + beta * (n - states)).reshape(g.shape)


def _canon(now: Tensor, before: list[Tensor], taps: Tensor) -> Tensor:
    """Return g_t + sum_i w_i g_(t-i); ``before`` has those of the tokens before, the last one first."""
    z = now + taps[0] * now
    for tap, each in zip(taps[1:], before, strict=False):
        z = z + tap * each
    return z


def _smear(now: Tensor, before: list[Tensor], share: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """Return g_t + a sigmoid(v g_t + c) g_(t-1)."""
    return now + share * _sigmoid(slope * now + offset) * before[0] if before else now


RECENT: dict[str, Callable[..., Tensor]] = {"canon_": _canon, "smear_": _smear}


def beside(g: Tensor, mixed: Callable[..., Tensor], direction: str, valid: Tensor | None) -> Tensor:
    """Return z of gates, each mixed with those of the valid tokens before it; padding is mixed with nothing.

    In both directions it is the mean of that and of the same with the tokens after.
    """
    sequences = g if g.ndim == 3 else g.reshape(-1, 1, g.shape[-1])
    z = _forward(sequences, mixed, valid)
    if direction == "both":
        back = _forward(sequences.flip(1), mixed, None if valid is None else valid.flip(1))
        z = (z + back.flip(1)) / 2
    return z.reshape(g.shape)


def _forward(g: Tensor, mixed: Callable[..., Tensor], valid: Tensor | None) -> Tensor:
    if not g.numel():
        return g
    texts = []
    for number, text in enumerate(g):
        kept: list[Tensor] = []
        rows = []
        for t, now in enumerate(text):
            rows.append(mixed(now, kept))
            if valid is None or valid[number, t]:
                kept = [now, *kept]
        texts.append(torch.stack(rows))
    return torch.stack(texts)


def _states(n: Tensor, decay: Tensor, valid: Tensor | None) -> Tensor:
    """Return the state that each token reads."""
    state, read = torch.zeros_like(n[:, 0]) if n.shape[1] else n.sum(1), []
    for t in range(n.shape[1]):
        read.append(state)
        after = decay * state + (1 - decay) * n[:, t]
        state = after if valid is None else torch.where(valid[:, t, None], after, state)
    return torch.stack(read, 1) if read else torch.zeros_like(n)


def running_mean(openness: Tensor, decay: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the state after each token, ``[B, T, R]``."""
    state, found = torch.zeros_like(openness[:, 0]), []
    for t in range(openness.shape[1]):
        after = decay * state + (1 - decay) * openness[:, t]
        state = after if valid is None else torch.where(valid[:, t, None], after, state)
        found.append(state)
    return torch.stack(found, 1)
