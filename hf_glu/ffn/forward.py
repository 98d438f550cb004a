"""What the FFN at a site computes, by itself.

Shapes: ``x`` is ``[N, hidden]``, units are ``[N, width]``, the output is ``[N, hidden]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_glu.ffn.linear import AnyLinear
from hf_glu.ffn.modes import keeping_modes
from hf_glu.ffn.sites import Site

ROWS = 16  # random inputs that a module is compared with its parts on
ROUNDING, ROUNDING_OF_HALF = 1e-4, 1e-2  # relative to the largest output


def ffn_units(site: Site, x: Tensor) -> Tensor:
    """Return the hidden units, which the out-projection is given."""
    projected = site.in_proj(x)
    if site.row.gate is not None:
        return site.act(site.anchor.get_submodule(site.row.gate)(x)) * projected
    if site.kind == "packed":
        gate, up = projected.chunk(2, dim=-1)
        return site.act(gate) * up
    return site.act(projected)


def ffn_output(site: Site, x: Tensor) -> Tensor:
    """Return the FFN's output, without dropout and residual."""
    out_proj = site.out_proj
    return out_proj(ffn_units(site, x).to(out_proj.weight.dtype))  # T5 keeps its out-projection in float32


@torch.no_grad()
def does_more(site: Site) -> bool:
    """Return whether the module of an FFN that is one by itself computes something else than `ffn_output`.

    Gemma 3n's leaves units out, Falcon-H1's multiplies its gate. Without weights that isn't known: False.
    """
    module, weight = site.anchor, site.in_proj.weight
    if weight.device.type == "meta":
        return False
    x = torch.randn(1, ROWS, site.hidden, generator=torch.Generator().manual_seed(0)).to(weight)
    with keeping_modes(module, training=False), torch.autocast(weight.device.type, enabled=False):
        theirs, ours = module(x), ffn_output(site, x)
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return True
    close = ROUNDING if weight.dtype in (torch.float32, torch.float64) else ROUNDING_OF_HALF
    return not torch.allclose(theirs.float(), ours.float(), rtol=close, atol=close * float(ours.abs().max()))


def is_alone(site: Site) -> bool:
    """Return whether a site is one FFN by itself, with one in-projection and one out-projection."""
    return site.kind not in ("experts", "mixer")


def projections(site: Site) -> list[AnyLinear]:
    """Return the gate projection (where it is one by itself), the in-projection and the out-projection."""
    gate = [site.anchor.get_submodule(site.row.gate)] if site.row.gate is not None else []
    return [*gate, site.in_proj, site.out_proj]
