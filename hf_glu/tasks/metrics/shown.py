"""Metrics as a person reads them."""

from __future__ import annotations

# metrics that are no shares
NUMBERS = frozenset({"loss", "perplexity", "bits_per_byte", "kl", "cosine"})


def show_metric(name: str, value: float) -> str:
    """Return a share as a percentage, anything else as a number of four digits: ``84.11%``, ``3.210``, ``12,345``."""
    if name.rpartition("/")[2] not in NUMBERS:
        return f"{value:.2%}"
    return f"{value:#.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def show_metrics(values: dict[str, float]) -> str:
    """Return metrics with their names, separated by commas."""
    return ", ".join(f"{name} {show_metric(name, value)}" for name, value in values.items())
