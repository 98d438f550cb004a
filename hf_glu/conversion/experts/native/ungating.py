"""Experts of Transformers' own banks without their inner gate: out(N(g)) in place of out(phi(g) * u).

The out-projection is fitted so that each expert gives what it gave, on the tokens that are routed to it.

Shapes: T tokens, H hidden size, W units of an expert, k experts a token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.elementwise import build_elementwise
from hf_glu.compat.of_models import HAS_BIAS, IS_TRANSPOSED, is_concatenated
from hf_glu.conversion.fit.calibration import MAX_TOKENS, Batches
from hf_glu.conversion.fit.fitting import HELD_OUT, RIDGE, Fit, damped
from hf_glu.ffn.experts.native import UNGATED, apply_gate
from hf_glu.ffn.sites import Site
from hf_glu.instruments import expert_tokens

RIDGES = (RIDGE, 1e-4, 1e-2, 1.0)


def routed_inputs(model: Any, bank: Site, batches: Batches) -> tuple[Tensor, Tensor]:
    """Return what a bank is given on ``batches``: tokens ``[T, H]`` in float32 and their experts ``[T, k]``.

    Padding is left out: it has no part in what the fit must keep.

    Raises:
        OptionError: the model never runs the bank on these batches.
    """
    tokens, experts = expert_tokens.routed_inputs(model, bank.anchor, batches, limit=MAX_TOKENS)
    return tokens.float(), experts


@torch.no_grad()
def drop_gates(bank: Any, source: str, x: Tensor, experts: Tensor) -> Fit:
    """Fit the out-projection of each ungated expert on the tokens that are routed to it, and clear its up rows."""
    for name, old in bank.named_parameters(recurse=False):  # copies: they are written into
        setattr(bank, name, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    before = after = total = 0.0
    act = build_elementwise(source).to(x)
    expert = tokens = 0
    for number, group in enumerate(bank.groups):
        for _ in range(group.count if group.name.startswith(UNGATED) else 0):
            mine = x[(experts == expert).any(1)]
            tokens += len(mine)
            errors = _fit_expert(bank, expert, act, bank.acts[number].to(x), mine) if len(mine) > 1 else (0.0, 0.0, 0.0)
            before, after, total = before + errors[0], after + errors[1], total + errors[2]
            _clear_up(bank, expert)
            expert += 1
        expert += 0 if group.name.startswith(UNGATED) else group.count
        bank.acts[number].to(bank.down_proj)
    share = math.sqrt(before / max(total, 1e-300)), math.sqrt(after / max(total, 1e-300))
    return Fit(before=share[0], after=share[1], tokens=tokens)


def _fit_expert(bank: Any, expert: int, old: nn.Module, new: nn.Module, x: Tensor) -> tuple[float, float, float]:
    """Fit one expert; return the squared errors on held-out tokens before and after, and the outputs' square.

    Each unit first keeps its mean effect, c_j = E[h_j a_j] / E[a_j^2] with h = phi(g) u and a = N(g); then ridge
    regression of the outputs on the units, towards that. The strength is the one that is best on held-out tokens.
    """
    weight, out = bank.gate_up_proj[expert].float(), bank.down_proj[expert].float()
    out = out if IS_TRANSPOSED.of(bank) else out.T  # [W, H]
    rows = x @ (weight if IS_TRANSPOSED.of(bank) else weight.T)
    if HAS_BIAS.of(bank):
        rows = rows + bank.gate_up_proj_bias[expert].flatten().float()
    units, kept = apply_gate(bank, new, rows, kept=False).double(), apply_gate(bank, old, rows).double()
    target, out = kept @ out.double(), out.double()
    held = max(1, int(HELD_OUT * len(x)))
    start = out * ((units * kept).mean(0) / units.square().mean(0).clamp_min(1e-20)).unsqueeze(1)
    gram = units[:-held].T @ units[:-held]
    cross = units[:-held].T @ (target[:-held] - units[:-held] @ start)
    tried = [start, *(start + torch.linalg.solve(damped(gram, ridge), cross) for ridge in RIDGES)]
    errors = [float((units[-held:] @ each - target[-held:]).square().sum()) for each in tried]
    best = tried[errors.index(min(errors))]
    bank.down_proj[expert] = (best if IS_TRANSPOSED.of(bank) else best.T).to(bank.down_proj.dtype)
    plain = float((units[-held:] @ out - target[-held:]).square().sum())
    return plain, min(errors), float(target[-held:].square().sum())


def _clear_up(bank: Any, expert: int) -> None:
    """Set the up rows of an expert, which nothing uses any more, to 0."""
    for tensor in (bank.gate_up_proj, bank.gate_up_proj_bias) if HAS_BIAS.of(bank) else (bank.gate_up_proj,):
        rows = tensor[expert].flatten() if tensor is not bank.gate_up_proj else tensor[expert]
        dim = rows.ndim - 1 if IS_TRANSPOSED.of(bank) else 0
        width = rows.shape[dim] // 2
        up = (
            rows.narrow(dim, width, width)
            if is_concatenated(bank)
            else rows.unflatten(dim, (width, 2)).select(dim + 1, 1)
        )
        up.zero_()
