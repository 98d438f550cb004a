"""How much of an FFN's inputs and units to leave out: the least error for the weights that are read.

The inputs, and the units, are cut by themselves at some shares, and the error of the FFN's output is measured. With
e(k) and f(k) the mean square errors, relative to each token's output, of inputs and of units cut to a share k, and w
and v the weights that they are multiplied by, the shares are those with the least e(k) + f(l) of all with
w k + v l = keep (w + v). (TEAL, https://arxiv.org/abs/2408.14690, section 4.3, goes there greedily, for each matrix of
a block.) All FFNs read the same share. With one problem for all of them, a relative error having one price everywhere,
SmolLM2-135M's perplexity grew by 12 % where it grows by 6 % so: the first and the last FFNs, which can leave most out
by that measure, are those that matter most.

Shapes: N tokens, H hidden size, W units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_glu.config.sparsity import Method
from hf_glu.conversion.fit.fitting import token_sizes
from hf_glu.ffn.forward import ffn_output, ffn_units, projections
from hf_glu.ffn.linear import AnyLinear, weight_rows
from hf_glu.ffn.sites import Site

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
LEAST = SHARES[-1]
STEP = 0.01


def threshold(score: Tensor, share: float) -> float | None:
    """Return what a ``share`` of all scores ``[N, C]`` is above; None: all are kept."""
    if share >= 1:
        return None
    flat = score.flatten()
    return float(flat.kthvalue(min(len(flat), max(1, round((1 - share) * len(flat))))).values)


def scores(x: Tensor, linear: AnyLinear, method: Method) -> Tensor:
    """Return the scores of a projection's inputs ``x`` ``[N, C]``, as thresholds are compared with."""
    found = x.float().abs()
    if method.weighed:
        found = found * weight_rows(linear).detach().float().norm(dim=0)
    if method.relative:
        deviation = found.var(1, keepdim=True, correction=0).sqrt()
        found = (found - found.mean(1, keepdim=True)) / deviation.clamp_min(1e-30)
    return found


@torch.no_grad()
def choose_shares(site: Site, x: Tensor, method: Method, keep: float) -> tuple[float, float]:
    """Return the shares of an FFN's inputs and of its units that are kept, measured on its inputs ``x`` ``[N, H]``."""
    *ins, out = projections(site)
    weights = [sum(linear.weight.numel() for linear in ins), out.weight.numel()]
    if not method.inputs:
        return 1.0, (keep * sum(weights) - weights[0]) / weights[1]
    units = ffn_units(site, x).to(out.weight.dtype)
    y = ffn_output(site, x)
    of_inputs, of_units = [scores(x, linear, method) for linear in ins], scores(units, out, method)
    errors: list[list[float]] = [[], []]
    for share in SHARES:
        cut = _with_cut_inputs(site, x, of_inputs, [threshold(each, share) for each in of_inputs])
        errors[0].append(square_error(y, cut))
        level = threshold(of_units, share)
        errors[1].append(square_error(y, out(units if level is None else units * (of_units > level))))
    return least_error(errors[0], errors[1], weights, keep)


def square_error(expected: Tensor, found: Tensor) -> float:
    """Return the mean square error of outputs ``[N, H]``, relative to each token's."""
    return float(((found - expected).double().norm(dim=1, keepdim=True) / token_sizes(expected)).square().mean())


def least_error(
    inputs: Sequence[float], units: Sequence[float], weights: Sequence[int], keep: float
) -> tuple[float, float]:
    """Return the shares of inputs and units with the least sum of errors, which are given by `SHARES`.

    Args:
        inputs, units: errors where these alone are cut.
        weights: that each is multiplied by.
        keep: share of all weights that is read.
    """
    first = np.arange(LEAST, 1 + STEP / 2, STEP)
    second = (keep * sum(weights) - first * weights[0]) / weights[1]
    able = (second >= LEAST - 1e-9) & (second <= 1 + 1e-9)
    first, second = first[able], second[able].clip(LEAST, 1)
    grid = SHARES[::-1]
    total = np.interp(first, grid, inputs[::-1]) + np.interp(second, grid, units[::-1])
    best = int(total.argmin())
    return float(first[best]), float(second[best])


def _with_cut_inputs(site: Site, x: Tensor, score: Sequence[Tensor], level: Sequence[float | None]) -> Tensor:
    """Return the FFN's output where each in-projection is given its own entries of ``x`` only."""
    handles = []
    for linear, own, cut in zip(projections(site), score, level, strict=False):
        if cut is not None:
            masked = x * (own > cut)
            handles.append(linear.register_forward_pre_hook(lambda module, args, masked=masked: (masked,)))
    try:
        return ffn_output(site, x)
    finally:
        for handle in handles:
            handle.remove()
