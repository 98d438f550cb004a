"""FFNs that take a long text a tile of tokens at a time, in both passes, so that what lies between their projections is
never there for all tokens at once (cf. tiled MLPs of Arctic Long Sequence Training, https://arxiv.org/abs/2506.13996).

A tile keeps its input only; the backward pass computes it again, up to the out-projection, and drops it.

Shapes: ``x`` is ``[..., hidden]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_glu.activation.context import Reader
from hf_glu.activation.kernels.autodiff import needs_formula
from hf_glu.errors import OptionError, shown
from hf_glu.ffn.expert_sites import own_module
from hf_glu.ffn.forward import is_alone
from hf_glu.ffn.sites import Site
from hf_glu.inplace import InPlace, become


class TiledFFN(InPlace):
    """What an FFN's module becomes.

    Attributes:
        tile: how many tokens it takes at a time.
    """

    tile: int

    def forward(self, x: Tensor) -> Tensor:
        """Apply the FFN."""
        run: Callable[..., Any] = super().forward  # type: ignore[misc]
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= self.tile or needs_formula(x):
            whole: Tensor = run(x)
            return whole
        if torch.is_grad_enabled():
            parts = [checkpoint(run, part, use_reentrant=False) for part in rows.split(self.tile)]
        else:
            parts = [run(part) for part in rows.split(self.tile)]
        return torch.cat(parts).view(*x.shape[:-1], -1)


def is_tileable(site: Site) -> bool:
    """Return whether an FFN is a module by itself, of which each token's output depends on that token alone."""
    return is_alone(site) and own_module(site) and not any(isinstance(part, Reader) for part in site.act.modules())


def tile_ffns(sites: list[Site], tile: int) -> list[Site]:
    """Make FFNs take ``tile`` tokens at a time; return those that do.

    Raises:
        OptionError: no positive number of tokens, or none of the FFNs can be taken so.
    """
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
        raise OptionError(f"tile is a number of tokens, such as 1024, got {shown(tile)}")
    found = [site for site in sites if is_tileable(site)]
    if not found:
        raise OptionError(
            f"tile: none of the {len(sites)} FFNs is a module by itself whose activation reads one token at a time: "
            "BERT's and BART's parts are spread over a layer, and states need the tokens in order"
        )
    for site in found:
        anchor: nn.Module = site.anchor
        become(anchor, TiledFFN)
        setattr(anchor, "tile", tile)  # noqa: B010  (a module of the family's class, to whoever checks types)
    return found
