"""The routes from a dense activation to a gated one, as data.

Every route is one formula. With the old in-projection (W, b), the new one ``[gate | up]`` is

    gate = s W, s b        up = t W, t b + c

so that act([gate | up]) is phi(s x) * (t x + c) for x = W h + b; the out-projection stays. ``s`` and ``c`` come as a
pair that half precision can represent where 1.702 can't.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_glu.activation import registry
from hf_glu.activation.stock import same_function
from hf_glu.config.registry import GATED, unwrapped
from hf_glu.errors import ConversionError

EXACT = "exact"
ROUNDING = "exact up to rounding"
APPROXIMATE = "approximate"


def weakest(*promises: str) -> str:
    """Return the promise of several conversions together."""
    return max(promises, key=(EXACT, ROUNDING, APPROXIMATE).index)


SLOPE = 1.702
# 217/128 * 151/256 = 0.99997, and bf16 has both; rounding 1.702 and 1/1.702 would shrink every FFN by 0.2 %
HALF_SLOPE, HALF_INVERSE = 217 / 128, 151 / 256

GELU_LIKE = frozenset({"gelu", "gelu_new"})


@dataclass(frozen=True, kw_only=True)
class Route:
    """One way from a dense to a gated activation.

    Attributes:
        name: what the report calls it.
        promise: ``exact``, ``exact up to rounding`` or ``approximate``.
        gate_scale: s.
        up_scale: t.
        up_bias: c.
        note: what to know about it.
    """

    name: str
    promise: str
    gate_scale: float = 1.0
    up_scale: float = 0.0
    up_bias: float = 0.0
    note: str = ""

    def constants(self, dtype: torch.dtype) -> tuple[float, float, float]:
        """Return (s, t, c) for weights of ``dtype``."""
        if self.gate_scale == SLOPE and self.up_bias and dtype in (torch.bfloat16, torch.float16):
            return HALF_SLOPE, self.up_scale, HALF_INVERSE
        return self.gate_scale, self.up_scale, self.up_bias

    def same_weights(self, other: Route) -> bool:
        """Return whether ``other`` gives the same weights."""
        return self.constants(torch.float32) == other.constants(torch.float32)

    def widen(self, tensor: Tensor, *, bias: bool, dim: int = 0) -> Tensor:
        """Return ``[gate | up]`` along ``dim`` for the dense in-projection's weight, or its bias."""
        s, t, c = self.constants(tensor.dtype)
        gate = tensor * s if s != 1 else tensor
        up = tensor * t if t else torch.zeros_like(tensor)
        return torch.cat([gate, up + c if bias else up], dim=dim)


def mix_route(source: str, *, gated: bool) -> Route:
    """Return the route to a learnable mix that starts at ``source``."""
    return Route(
        name=f"mix, all {source} at first" + (", up = 1" if gated else ""),
        promise=EXACT,
        up_bias=float(gated),
        note="train it; hf_glu.anneal drives the mix to the target, hf_glu.freeze_mix folds it",
    )


def wrap_route(source: str, target: str) -> Route:
    """Return the route between two activations of one shape, such as ``gelu`` and ``stateful_gelu``."""
    if same_function(unwrapped(source), unwrapped(target)):
        return WRAP
    return Route(name=f"{source} -> {target}", promise=APPROXIMATE, note="the function changes, fine-tune it")


FITTED = Route(name="up = 1, fitted", promise=APPROXIMATE, up_bias=1.0, note="no route of its own: as good as the fit")
NO_CHANGE = Route(name="none", promise=EXACT, note="it has this activation already")
WRAP = Route(name="wrapped, without effect at first", promise=EXACT)
UNIT_UP = Route(name="up = 1", promise=EXACT, up_bias=1.0)
SIGMOID_SLOPE = Route(
    name="gate = 1.702 x, up = 1/1.702", promise=APPROXIMATE, gate_scale=SLOPE, up_bias=1 / SLOPE,
    note="x sigmoid(1.702 x) for gelu: off by at most 0.0203, at |x| = 2.27",
)  # fmt: skip
SELF_GATE = Route(
    name="gate = 1.702 x, up = x", promise=APPROXIMATE, gate_scale=SLOPE, up_scale=1.0,
    note="x sigmoid(1.702 x) for gelu: off by at most 0.0203, at |x| = 2.27",
)  # fmt: skip
PLUS_ONE = Route(
    name="gate = x, up + 1", promise=APPROXIMATE,
    note="x sigmoid(1.702 x) for gelu, and clamped at 7",
)  # fmt: skip


def _exactly(route: Route, promise: str = ROUNDING, name: str | None = None) -> Route:
    return Route(
        name=name or route.name,
        promise=promise,
        gate_scale=route.gate_scale,
        up_scale=route.up_scale,
        up_bias=route.up_bias,
    )


# (dense, gated) -> route, beside the general one: phi -> phi-GLU by `UNIT_UP`
_TABLE: dict[tuple[str, str], Route] = {
    ("silu", "glu"): Route(name="gate = up = x", promise=ROUNDING, up_scale=1.0),
    ("relu", "dreglu"): UNIT_UP,
    ("relu2", "dreglu"): Route(name="gate = up = x", promise=EXACT, up_scale=1.0),
    ("relu2", "reglu"): Route(name="gate = up = x", promise=EXACT, up_scale=1.0),
    ("quick_gelu", "glu"): _exactly(SELF_GATE),
    ("quick_gelu", "swiglu"): _exactly(SIGMOID_SLOPE),
    ("quick_gelu", "swiglu_oss"): PLUS_ONE,
    **{(dense, "swiglu"): SIGMOID_SLOPE for dense in GELU_LIKE},
    **{(dense, "glu"): SELF_GATE for dense in GELU_LIKE},
    **{(dense, "swiglu_oss"): PLUS_ONE for dense in GELU_LIKE},
    ("gelu", "geglu_new"): Route(name="up = 1", promise=APPROXIMATE, up_bias=1.0, note="tanh form: within 5e-4"),
    ("gelu_new", "geglu"): Route(name="up = 1", promise=APPROXIMATE, up_bias=1.0, note="erf form: within 5e-4"),
}


def find_route(source: str, target: str) -> Route:
    """Return the best route from the dense activation ``source`` to the gated ``target``.

    Raises:
        ConversionError: there is none; the message names the exact targets of ``source``.
    """
    if GATED not in registry[target].flags:
        return wrap_route(source, target)
    target = unwrapped(target)
    gate = registry[target].gate
    if gate is not None and same_function(source, gate):
        return UNIT_UP if source == gate else _exactly(UNIT_UP)
    for (dense, gated), route in _TABLE.items():
        if same_function(source, dense) and (gated == target or _same_gate(gated, target)):
            return route
    exact = exact_targets(source)
    raise ConversionError(f"no route from {source} to {target}; exact from {source}: {', '.join(exact)}")


def _same_gate(gated: str, target: str) -> bool:
    """Return whether two gated names are N(g) * u with the same N (``swiglu`` and ``silu_glu``)."""
    first, second = registry[gated].gate, registry[target].gate
    return first is not None and second is not None and same_function(first, second)


def exact_targets(source: str) -> list[str]:
    """Return the gated names that ``source`` converts to without approximation."""
    by_gate = [entry.name for entry in registry if entry.gate is not None and same_function(source, entry.gate)]
    by_row = [gated for (dense, gated), route in _TABLE.items() if dense == source and route.promise != APPROXIMATE]
    return list(dict.fromkeys([*(by_gate or [f"{source}_glu"]), *by_row]))
