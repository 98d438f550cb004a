"""Whether a layer with experts gives what it gave: it is run on random tokens before and after."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_glu.errors import ConversionError
from hf_glu.ffn.sites import Site
from hf_glu.instruments.probe import evaluating

TOKENS = 64  # random ones that a layer is compared on, before and after
SAME = {torch.float64: 1e-9, torch.float32: 1e-4}
SAME_IN_LESS = 5e-2


def sample(layer: nn.Module, site: Site) -> Tensor | None:
    """Return what a layer gives on random tokens; None where it takes more than tokens."""
    weight: Tensor = site.anchor.get_parameter("down_proj")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, site.hidden, generator=generator).to(weight)
    try:
        with evaluating(layer):
            out = layer(x)
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        return None
    out = out[0] if isinstance(out, tuple) else out
    return out.detach().clone() if isinstance(out, Tensor) else None


def compare_layers(site: Site, before: Tensor | None, after: Tensor | None, hint: str = "") -> None:
    """Raise ConversionError where a layer gives something else than before.

    In half precision, where experts' scores may tie, the median of the tokens counts, else the worst.
    """
    if before is None:
        return
    allowed, error = SAME.get(before.dtype, SAME_IN_LESS), float("inf")
    if after is not None:
        errors = (after - before).abs().flatten(0, -2).amax(-1) / before.abs().max().clamp_min(1e-30)
        error = float(errors.max() if before.dtype in SAME else errors.float().median())  # but for ties
    if not error <= allowed:
        raise ConversionError(
            f"{site.name}: its router weighs copies in a way of its own (the layer would differ by {error:.2g} of its "
            f"size){hint}"
        )
