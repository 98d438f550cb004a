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
from transformers.pytorch_utils import Conv1D

from hf_glu.activation.kernels.autodiff import needs_formula
from hf_glu.activation.kernels.known import is_bare
from hf_glu.activation.module import is_recomputable
from hf_glu.errors import NoSiteError, OptionError
from hf_glu.ffn.expert_sites import BESIDE, own_module
from hf_glu.ffn.forward import does_more, projections
from hf_glu.ffn.lean import LeanOut
from hf_glu.ffn.linear import LINEAR, AnyLinear, weight_rows
from hf_glu.ffn.sites import Site, convertible_sites, follow
from hf_glu.ffn.sparse_kernel import find_kernel, multiply_kept, multiply_open
from hf_glu.inplace import InPlace, become, stock_class

MOST_TOKENS = 4  # more of them open too many units between them
MOST_GATHERED = 0.4  # measured: a gather costs more than it saves beyond


def skip_zeros(model: nn.Module, *, most_open: float | None = None, most_tokens: int = MOST_TOKENS) -> int:
    """Make the FFNs of ``model`` that are gated by a ReLU skip closed units at inference; return how many do.

    Outputs differ by rounding. Each unit's weights are laid next to each other in memory, in the model's own
    parameters, and read there at each call: nothing is kept beside them. An FFN whose projections are wrapped,
    hooked or offloaded (adapters, parametrizations) is computed as usual. Calling it again changes the two numbers.

    Args:
        model: with ``reglu``, ``relu2glu`` or another gate that is 0 below 0, in modules of their own (GPT-2, T5, Llama
            and their relatives; not BERT's, whose parts are spread).
        most_open: share of open units above which an FFN is computed as usual. None: where leaving the others out costs
            more than it saves, which is nowhere for one token on a CPU with a C++ compiler, whose kernels read
            weights where they lie (float32, bfloat16), and beyond 0.4 else.
        most_tokens: tokens of one call above which it is, too.

    Raises:
        NoSiteError: there is no such FFN.
        OptionError: a number out of range.
    """
    if not 0 <= (most_open or 0) <= 1 or most_tokens < 1:
        raise OptionError(f"most_open is a share, most_tokens at least 1, got {most_open} and {most_tokens}")
    sites = [site for site in convertible_sites(model) if _skippable(site)]
    if not sites:
        raise NoSiteError(f"{type(model).__name__} has no FFN with a gate that is 0 below 0, such as reglu")
    for site in sites:
        become(site.anchor, SkipZeros)
        site.anchor.__dict__["hf_glu_units"] = Units(site, most_open, most_tokens)
        for linear in projections(site):
            lay_out(linear, by_input=linear is site.out_proj)
    return len(sites)


@torch.no_grad()
def lay_out(linear: AnyLinear, *, by_input: bool) -> None:
    """Lay the weights of each input, or of each output, next to each other in memory; values and shape stay."""
    transposed = by_input != isinstance(linear, Conv1D)  # whose weight is [in, out]
    with torch.inference_mode(linear.weight.is_inference()):  # else nobody could train it any more
        weight = linear.weight.data
        linear.weight.data = weight.T.contiguous().T if transposed else weight.contiguous()


def _skippable(site: Site) -> bool:
    gated = site.widened or site.row.gate is not None
    return gated and own_module(site) and closes(gate_of(site)) and not does_more(site)


def gate_of(site: Site) -> nn.Module:
    """Return the elementwise part of a gated site's activation."""
    phi = getattr(site.act, "phi", None) if site.widened else site.act
    return site.act if phi is None else phi


@torch.no_grad()
def closes(phi: nn.Module) -> bool:
    """Return whether ``phi`` has no parameters and is 0 wherever its input is negative."""
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
        units, tokens = self.hf_glu_units, x.numel() // x.shape[-1]
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or not 0 < tokens <= units.most_tokens
        whole = whole or torch.is_autocast_enabled(x.device.type)  # the family's own dtypes
        if whole or args or kwargs or not units.are_readable():
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return units(x.reshape(tokens, -1)).view(x.shape)


class Units:
    """The weights of one FFN by unit."""

    def __init__(self, site: Site, most_open: float | None, most_tokens: int) -> None:
        self.site, self.most_open, self.most_tokens = site, most_open, most_tokens

    def are_readable(self) -> bool:
        """Return whether the FFN is still what it was, its projections plain maps and its gate known exactly.

        Then what is read here is what calling them would compute.
        """
        row, anchor = self.site.row, self.site.anchor
        linears = [follow(anchor, path) for path in (row.in_proj, row.out_proj, row.gate) if path]
        idle = all(_is_idle(part) for part in anchor.modules() if isinstance(part, BESIDE))
        return idle and all(is_plain(linear) for linear in linears) and is_recomputable(follow(anchor, row.act))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the FFN's output for ``x``, both ``[N, H]``, in the out-projection's dtype: T5 keeps it in float32."""
        (gate, gate_bias), (up, up_bias) = self.halves()
        opened = gate_of(self.site)(functional.linear(x, gate, gate_bias))
        in_place = len(x) == 1 and self._lie_well(x, opened, up, up_bias)
        free = in_place and self.most_open is None  # leaving units out costs nothing there
        active = None if free else (opened[0] if len(x) == 1 else opened.any(0)).nonzero().squeeze(1)
        most = MOST_GATHERED if self.most_open is None else self.most_open
        out = self.site.out_proj
        if active is not None and len(active) > most * len(gate):
            units = opened * functional.linear(x, up, up_bias)
        elif active is None or in_place:
            units = multiply_open(opened[0], x[0].contiguous(), up.detach(), up_bias).unsqueeze(0)
        else:
            return self._gathered(x, opened, active, up, up_bias)
        if in_place:
            rows = weight_rows(out).T.detach()  # [W, H]
            return multiply_kept(units[0], rows, out.bias, 0.0, relative=False, scale=None).unsqueeze(0)
        return out(units.to(out.weight.dtype))

    def _gathered(self, x: Tensor, opened: Tensor, active: Tensor, up: Tensor, up_bias: Tensor | None) -> Tensor:
        """Return the output of the ``active`` units ``[A]`` by copies of their weights."""
        out, rows = self.site.out_proj, weight_rows(self.site.out_proj).T
        bias = None if up_bias is None else up_bias[active]
        units = opened[:, active].mul_(functional.linear(x, up.index_select(0, active), bias)).to(rows.dtype)
        if len(x) == 1 and rows.is_contiguous():  # reads the rows in place
            found = functional.embedding_bag(active.unsqueeze(0), rows, per_sample_weights=units, mode="sum")
        else:
            found = units @ rows.index_select(0, active)
        return found if out.bias is None else found + out.bias

    def _lie_well(self, x: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None) -> bool:
        """Return whether there are kernels that may read all that one token needs where it lies, and nobody traces."""
        out = self.site.out_proj
        rows, given = weight_rows(out).T, (gates, up, up_bias, out.weight, out.bias)
        alike = all(part is None or (part.dtype, part.device.type) == (x.dtype, "cpu") for part in given)
        whole = gates.is_contiguous() and up.is_contiguous() and rows.is_contiguous()
        return alike and whole and not needs_formula(x, *given) and find_kernel(x.dtype) is not None

    def halves(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return the gate's and the up half's rows ``[W, H]``, each with its bias."""
        ins = projections(self.site)[:-1]
        if len(ins) == 2:
            return [(weight_rows(linear), linear.bias) for linear in ins]
        (fused,) = ins
        biases = (None, None) if fused.bias is None else fused.bias.chunk(2)
        return list(zip(weight_rows(fused).chunk(2), biases, strict=True))


def is_plain(linear: nn.Module) -> bool:
    """Return whether a projection is the plain map of its weight and bias, which are there."""
    if stock_class(linear, LeanOut) not in LINEAR or not is_bare(linear):
        return False
    return type(linear.weight) is nn.Parameter and linear.weight.device.type != "meta"


def _is_idle(beside: nn.Module) -> bool:
    """Return whether a module that stands beside an FFN's parts does nothing now."""
    drops = isinstance(beside, nn.Dropout) and beside.training and beside.p > 0
    return type(beside) in BESIDE and is_bare(beside) and not drops
