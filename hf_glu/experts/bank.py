"""A group of experts that share an activation: their weights as one 3-D parameter, computed group by group.

Shapes: N token-expert pairs sorted by expert, E experts of the group, H hidden size, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from hf_glu.activation import OwnedActivation, OwnedModule, build_elementwise, registry
from hf_glu.config import GluConfig
from hf_glu.expert_options import Group
from hf_glu.registry import GATED

STD = 0.02
ALIGNMENT = 16  # bytes of a row: torch's grouped GEMM wants no less


def build_activation(name: str) -> nn.Module:
    """Return the activation of a group, ours or Transformers' own."""
    entry = registry.find(name)
    return build_elementwise(name) if entry is None else entry.factory()


def is_gated(name: str) -> bool:
    """Tell whether an expert's in-projection is ``[gate | up]``."""
    entry = registry.find(name)
    return entry is not None and GATED in entry.flags


class Bank(OwnedModule):
    """out_e(act(in_e(x))) for each expert e of one group.

    ``in_proj`` is ``[E, W or 2 W, H]``, ``out_proj`` ``[E, H, W]``; biases ``[E, W or 2 W]`` and ``[E, H]``, or None.

    Args:
        group: which experts.
        hidden: H.
        width: W, where the group doesn't say.
        bias: whether there are biases.
        mix: of learnable activations.
    """

    def __init__(self, group: Group, hidden: int, width: int, *, bias: bool, mix: dict[str, object] | None) -> None:
        super().__init__()
        self.name, self.count, self.width = group.name, group.count, group.width or width
        rows = self.width * (2 if is_gated(group.name) else 1)
        self.in_proj = nn.Parameter(torch.empty(group.count, rows, hidden))
        self.out_proj = nn.Parameter(torch.empty(group.count, hidden, self.width))
        self.in_bias = nn.Parameter(torch.empty(group.count, rows)) if bias else None
        self.out_bias = nn.Parameter(torch.empty(group.count, hidden)) if bias else None
        self.act = build_activation(group.name)
        if isinstance(self.act, OwnedActivation):
            self.act.configure(GluConfig(mix=mix), self.width)
        if self.in_proj.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights, biases of 0."""
        for weight in (self.in_proj, self.out_proj):
            init.normal_(weight, std=STD)
        for bias in (self.in_bias, self.out_bias):
            if bias is not None:
                init.zeros_(bias)

    def forward(self, x: Tensor, counts: Tensor, backend: str | None) -> Tensor:
        """Return the outputs for ``x``, both ``[N, H]``; its first ``counts[0]`` rows go to expert 0, and so on."""
        x, in_proj, out_proj = (_autocast(tensor) for tensor in (x, self.in_proj, self.out_proj))
        if (backend or choose_backend(x, in_proj, out_proj)) == "loop":
            return self._loop(x, in_proj, out_proj, counts)
        ends = counts.cumsum(0).to(torch.int32)
        hidden = functional.grouped_mm(x, in_proj.transpose(1, 2), offs=ends)
        which = torch.repeat_interleave(counts, output_size=len(x)) if self.in_bias is not None else None
        if self.in_bias is not None:
            hidden = hidden + self.in_bias.to(hidden.dtype)[which]
        out = functional.grouped_mm(self.act(hidden).to(x.dtype), out_proj.transpose(1, 2), offs=ends)
        return out if self.out_bias is None else out + self.out_bias.to(out.dtype)[which]

    def _loop(self, x: Tensor, in_proj: Tensor, out_proj: Tensor, counts: Tensor) -> Tensor:
        parts = []
        for expert, part in enumerate(x.split(counts.tolist())):
            in_bias = None if self.in_bias is None else self.in_bias[expert].to(x.dtype)
            out_bias = None if self.out_bias is None else self.out_bias[expert].to(x.dtype)
            hidden = self.act(functional.linear(part, in_proj[expert], in_bias)).to(x.dtype)
            parts.append(functional.linear(hidden, out_proj[expert], out_bias))
        return torch.cat(parts)

    def extra_repr(self) -> str:
        """Show the group in the model's printout."""
        return f"{self.count} x {self.name}, width={self.width}"


def _autocast(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in autocast's dtype, where that is on: the grouped GEMM has no rule of its own there."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def choose_backend(x: Tensor, *weights: Tensor) -> str:
    """Return ``grouped`` where torch's grouped GEMM takes these tensors, else ``loop``."""
    known = (torch.bfloat16, torch.float16, torch.float32) if x.device.type == "cpu" else (torch.bfloat16,)
    rows = [weight.shape[dim] * weight.element_size() for weight in weights for dim in (1, 2)]
    takes = x.dtype in known and all(size % ALIGNMENT == 0 for size in rows) and len(x) > 0
    compiled = torch.compiler.is_compiling() and x.dtype == torch.float32
    return "grouped" if takes and not compiled else "loop"
