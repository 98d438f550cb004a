"""What the FFN at a site computes, by itself.

Shapes: ``x`` is ``[N, hidden]``, units are ``[N, width]``, the output is ``[N, hidden]``.
"""

from __future__ import annotations

from torch import Tensor

from hf_glu.ffn.linear import AnyLinear
from hf_glu.ffn.sites import Site


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


def is_alone(site: Site) -> bool:
    """Return whether a site is one FFN by itself, with one in-projection and one out-projection."""
    return site.kind not in ("experts", "mixer")


def projections(site: Site) -> list[AnyLinear]:
    """Return the gate projection (where it is one by itself), the in-projection and the out-projection."""
    gate = [site.anchor.get_submodule(site.row.gate)] if site.row.gate is not None else []
    return [*gate, site.in_proj, site.out_proj]
