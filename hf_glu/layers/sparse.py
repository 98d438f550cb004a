"""ReLU-class gates at inference: what a closed gate multiplies is not computed.

The gate is computed for all units; up rows and out columns of the units that are open, and only those, are read. While
decoding, a token's FFN is bound by reading weights: with a share a of open units it reads (1 + 2 a) / 3 of them.

Shapes: N tokens, H hidden size, W units, A of which are open for any of the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_glu.errors import NoSiteError, OptionError
from hf_glu.inplace import InPlace, become
from hf_glu.layers.expert_sites import own_module
from hf_glu.layers.linear import weight_rows
from hf_glu.layers.sites import Site, convertible_sites

MOST_TOKENS = 4  # more of them open too many units between them
MOST_OPEN = 0.4  # measured: a gather costs more than it saves beyond


def skip_zeros(model: nn.Module, *, most_open: float = MOST_OPEN, most_tokens: int = MOST_TOKENS) -> int:
    """Have the FFNs of ``model`` that are gated by a ReLU skip closed units at inference; return how many do.

    Outputs differ by rounding. Each FFN keeps a copy of its out-projection with a row for each unit, and GPT-2's of its
    in-projection. Calling it again changes the two numbers.

    Args:
        model: with ``reglu``, ``relu2glu`` or another gate that is 0 below 0, in modules of their own (GPT-2, T5, Llama
            and their relatives; not BERT's, whose parts are spread).
        most_open: share of open units above which an FFN is computed as usual.
        most_tokens: tokens of one call above which it is, too.

    Raises:
        NoSiteError: there is no such FFN.
        OptionError: a number out of range.
    """
    if not 0 <= most_open <= 1 or most_tokens < 1:
        raise OptionError(f"most_open is a share, most_tokens at least 1, got {most_open} and {most_tokens}")
    sites = [site for site in convertible_sites(model) if _skippable(site)]
    if not sites:
        raise NoSiteError(f"{type(model).__name__} has no FFN with a gate that is 0 below 0, such as reglu")
    for site in sites:
        become(site.anchor, SkipZeros)
        site.anchor.__dict__["hf_glu_units"] = Units(site, most_open, most_tokens)
    return len(sites)


def _skippable(site: Site) -> bool:
    gated = site.widened or site.row.gate is not None
    return gated and own_module(site) and closes(gate_of(site))


def gate_of(site: Site) -> nn.Module:
    """Return the elementwise part of a gated site's activation."""
    phi = getattr(site.act, "phi", None) if site.widened else site.act
    return site.act if phi is None else phi


@torch.no_grad()
def closes(phi: nn.Module) -> bool:
    """Tell whether ``phi`` has no parameters and is 0 wherever its input is negative."""
    if any(True for _ in phi.parameters()):
        return False
    try:
        value = phi(torch.tensor([-9.0, -1.0, -0.01, 1.0]))
    except (TypeError, ValueError, RuntimeError):
        return False
    return bool(value.shape == (4,) and not value[:3].any() and value[3])


class SkipZeros(InPlace):
    """What an FFN's module becomes."""

    hf_glu_units: Units

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Apply the FFN, closed units left out where that pays."""
        tokens = x.numel() // x.shape[-1]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not 0 < tokens <= self.hf_glu_units.most_tokens:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return self.hf_glu_units(x.reshape(tokens, -1)).view(x.shape)


class Units:
    """The weights of one FFN by unit."""

    def __init__(self, site: Site, most_open: float, most_tokens: int) -> None:
        self.site, self.most_open, self.most_tokens = site, most_open, most_tokens
        self._known: tuple[Any, ...] = ()
        self._rows: tuple[Any, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the FFN's output for ``x``, both ``[N, H]``."""
        gate, gate_bias, up, up_bias, out, out_bias = self.rows()
        opened = gate_of(self.site)(functional.linear(x, gate, gate_bias))
        active = (opened[0] if len(x) == 1 else opened.any(0)).nonzero().squeeze(1)
        if len(active) > self.most_open * len(gate):
            units = opened * functional.linear(x, up, up_bias)
            return self.site.out_proj(units.to(self.site.out_proj.weight.dtype)).to(x.dtype)
        bias = None if up_bias is None else up_bias[active]
        units = opened[:, active].mul_(functional.linear(x, up.index_select(0, active), bias)).to(out.dtype)
        if len(x) == 1:  # reads the rows in place
            found = functional.embedding_bag(active.unsqueeze(0), out, per_sample_weights=units, mode="sum")
        else:
            found = units @ out.index_select(0, active)
        return (found if out_bias is None else found + out_bias).to(x.dtype)

    def rows(self) -> tuple[Any, ...]:
        """Return gate and up rows ``[W, H]``, out rows ``[W, H]``, each with its bias; made anew where they change."""
        site = self.site
        linears = [site.in_proj, site.out_proj]
        if site.row.gate is not None:
            linears.insert(0, site.anchor.get_submodule(site.row.gate))
        known = tuple((each.weight.data_ptr(), each.weight._version, each.weight.dtype) for each in linears)
        if known != self._known:
            into = [part for each in linears[:-1] for part in _halves(each, len(linears) == 2)]
            out = site.out_proj
            self._rows = (*into, weight_rows(out).detach().T.contiguous(), out.bias)
            self._known = known
        return self._rows


def _halves(linear: Any, fused: bool) -> list[Tensor | None]:
    """Return the rows and biases of a projection, those of its halves where it gives ``[g | u]``."""
    rows, bias = weight_rows(linear).detach().contiguous(), linear.bias
    if not fused:
        return [rows, bias]
    halves = rows.chunk(2)
    biases = (None, None) if bias is None else bias.chunk(2)
    return [halves[0], biases[0], halves[1], biases[1]]
