"""Transformers' own elementwise activations, by name: neither it nor torch is imported for that."""

from __future__ import annotations

from hf_glu.config.registry import GATED, registry

# Names under which Transformers keeps the same function: bitwise in the first two, up to rounding in the third.
SAME_FUNCTION = (
    frozenset({"gelu", "gelu_python"}),
    frozenset({"silu", "swish"}),
    frozenset({"gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"}),
)


def is_elementwise(name: object) -> bool:
    """Return whether there is an elementwise activation of this name: Transformers', or one of ours without a gate."""
    entry = registry.find(name)
    return isinstance(name, str) and registry.is_stock(name) if entry is None else GATED not in entry.flags


def elementwise_names() -> list[str]:
    """Return the names of all elementwise activations that Transformers has now."""
    return [name for name in registry.stock() if registry.is_stock(name)]


def same_function(first: str, second: str) -> bool:
    """Return whether two elementwise names stand for one function (up to rounding)."""
    return first == second or any(first in names and second in names for names in SAME_FUNCTION)
