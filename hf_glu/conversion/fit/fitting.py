"""Making a changed FFN reproduce the old one on calibration inputs.

Shapes: N tokens, H hidden size, W width. ``x`` is ``[N, H]``, units ``[N, W]``, outputs ``[N, H]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_glu.ffn.forward import ffn_output, ffn_units, projections
from hf_glu.ffn.linear import in_features, set_rows, weight_rows
from hf_glu.ffn.sites import Site

CHUNK = 4096
RIDGE = 1e-6
RIDGES = (0.0, 1e-2, 0.1, 1.0)  # of each unit's own power
HELD_OUT = 0.1


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How to fit.

    Attributes:
        steps: of layer-wise distillation, which trains all projections of the FFN; 0: least squares only.
        batch: tokens a step.
        lr: of Adam, decayed to 0 along a cosine.
        seed: of the order of tokens.
    """

    steps: int = 400
    batch: int = 1024
    lr: float = 2e-3
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The `relative_error` of the FFN's output on held-out tokens, before and after fitting."""

    before: float
    after: float
    tokens: int


def token_sizes(outputs: Tensor) -> Tensor:
    """Return what a token's error is compared with, ``[N, 1]``: |y|, or the median of all where that is larger.

    Language models have a few tokens whose outputs are a hundred times the others': in plain squares they were all that
    counts. The errors that healing reports weigh alike.
    """
    norms = outputs.detach().double().norm(dim=1, keepdim=True)
    return norms.clamp_min(float(norms.median())).clamp_min(1e-20)


def relative_error(site: Site, x: Tensor, target: Tensor) -> float:
    """Return |ffn(x) - target| / |target| in Frobenius norms, every token over its `token_sizes`."""
    error = total = 0.0
    sizes = token_sizes(target)
    with torch.no_grad():
        for part, wanted, size in zip(x.split(CHUNK), target.split(CHUNK), sizes.split(CHUNK), strict=True):
            error += float(((ffn_output(site, part).double() - wanted.double()) / size).square().sum())
            total += float((wanted.double() / size).square().sum())
    return math.sqrt(error / max(total, 1e-300))


def outputs_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``function`` of ``x``, a chunk of tokens at a time."""
    with torch.no_grad():
        return torch.cat([function(part) for part in x.split(CHUNK)])


def contributions(units: Callable[[Tensor], Tensor], out_rows: Tensor, x: Tensor) -> Tensor:
    """Return E[a_j^2 / size^2] |w_j|^2, the mean square of what unit j adds to the output: ``[W]`` in float64.

    The size is that of the token, see `token_sizes`.
    """
    power = torch.zeros(out_rows.shape[1], dtype=torch.float64, device=x.device)
    with torch.no_grad():
        for part in x.split(CHUNK):
            found = units(part)
            power += (found.double() / token_sizes(found @ out_rows.to(found.dtype).T)).square().sum(0)
    return power / len(x) * out_rows.double().square().sum(0)


def damped(gram: Tensor, ridge: float, *, own: float = 0.0) -> Tensor:
    """Return normal equations with ``ridge`` times their mean diagonal added to it, and ``own`` times each entry."""
    diagonal = gram.diagonal()
    return gram + torch.diag(ridge * diagonal.mean().clamp_min(1e-12) + own * diagonal)


@torch.no_grad()
def constant_direction(x: Tensor) -> Tensor:
    """Return u, ``[H]`` in float64, with the least |x u - 1|^2: what stands in for a bias of 1."""
    gram, total = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64), x.double().sum(0)
    for part in x.split(CHUNK):
        gram += part.double().T @ part.double()
    return torch.linalg.solve(damped(gram, RIDGE), total)


def fit_change(site: Site, x: Tensor, change: Callable[[], None], options: FitOptions) -> Fit:
    """Make a change to the FFN at ``site``, then fit it to give what it gave before on ``x``.

    It is done in float32, on copies of the weights.
    """
    dtypes = [module.weight.dtype for module in projections(site)]
    for module in projections(site):  # copies: what is fitted is written into
        bias = None if module.bias is None else module.bias.detach().clone().float()
        set_rows(module, weight_rows(module).detach().clone().float(), bias)
    old = outputs_of(partial(ffn_output, site), x)
    change()
    result = fit(site, x, old, options)
    for module, dtype in zip(projections(site), dtypes, strict=True):
        module.to(dtype)
    site.act.to(dtypes[0])
    return result


def normal_equations(site: Site, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return U'U ``[W, W]`` and U'(target - U W) ``[W, H]`` of the units U, in float64, a chunk of tokens at a time.

    Every token is over its size. U has a column of ones where the out-projection has a bias.
    """
    bias = site.out_proj.bias is not None
    width = in_features(site.out_proj) + bias
    gram = torch.zeros(width, width, dtype=torch.float64, device=x.device)
    cross = torch.zeros(width, target.shape[1], dtype=torch.float64, device=x.device)
    sizes = token_sizes(target)
    for part, wanted, size in zip(x.split(CHUNK), target.split(CHUNK), sizes.split(CHUNK), strict=True):
        units = ffn_units(site, part).double()
        if bias:
            units = torch.cat([units, units.new_ones(len(units), 1)], dim=1)
        units = units / size
        gram += units.T @ units
        cross += units.T @ ((wanted.double() - ffn_output(site, part).double()) / size)
    return gram, cross


@torch.no_grad()
def solve_out_projection(
    site: Site,
    train: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    *,
    ridges: Sequence[float] = RIDGES,
    floor: float = RIDGE,
) -> None:
    """Re-solve the out-projection so that the FFN gives a target: ridge regression towards the present weights W.

    min_V |U V - (target - U W)|^2 + r sum_j |U_j|^2 |V_j|^2, see `normal_equations`.

    Args:
        site: the FFN.
        train: inputs and targets, both ``[N, H]``.
        held: others, which choose the strength r, or the present weights.
        ridges: those to choose from.
        floor: of the mean diagonal, added to each.
    """
    (gram, cross), (held_gram, held_cross) = normal_equations(site, *train), normal_equations(site, *held)

    def error(change: Tensor) -> float:  # up to a constant
        return float(((held_gram @ change - 2 * held_cross) * change).sum())

    solved = [torch.linalg.solve(damped(gram, floor, own=ridge), cross) for ridge in ridges]
    change = min(torch.zeros_like(cross), *solved, key=error)
    rows, bias, width = weight_rows(site.out_proj), site.out_proj.bias, in_features(site.out_proj)
    new_bias = None if bias is None else (bias.double() + change[width]).to(rows.dtype)
    set_rows(site.out_proj, (rows.double() + change[:width].T).to(rows.dtype), new_bias)


def distill(site: Site, x: Tensor, target: Tensor, options: FitOptions) -> None:
    """Train every projection of the FFN for a few steps to give ``target`` on ``x`` (mean squared error, Adam).

    Every token is over its size, see `token_sizes`.
    """
    parameters = [parameter for module in projections(site) for parameter in module.parameters(recurse=False)]
    trainable = [parameter.requires_grad for parameter in parameters]
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(parameters, lr=options.lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, options.steps))
    sizes = token_sizes(target).to(target.dtype)
    scale = (target / sizes).square().mean().clamp_min(1e-20)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            for _ in range(options.steps):
                chosen = torch.randint(len(x), (min(options.batch, len(x)),), generator=generator).to(x.device)
                error = (ffn_output(site, x[chosen]) - target[chosen]) / sizes[chosen]
                loss = error.square().mean() / scale
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
    finally:
        for parameter, was in zip(parameters, trainable, strict=True):
            parameter.requires_grad_(was)
            parameter.grad = None


def fit(site: Site, x: Tensor, target: Tensor, options: FitOptions) -> Fit:
    """Fit the FFN at ``site`` to give ``target`` on ``x``: least squares, distillation, least squares again.

    The last tenth of the tokens is held out: the errors are measured there, and the weights that were best there stay.
    """
    held = max(1, int(HELD_OUT * len(x)))
    train, test = (x[:-held], target[:-held]), (x[-held:], target[-held:])
    best = before = relative_error(site, *test)
    state = _state(site)
    stages: list[Callable[[], None]] = [lambda: solve_out_projection(site, train, test)]
    if options.steps:
        stages += [lambda: distill(site, *train, options), lambda: solve_out_projection(site, train, test)]
    for stage in stages:
        stage()
        error = relative_error(site, *test)
        if error < best:
            best, state = error, _state(site)
    for parameter, value in zip(
        (p for m in projections(site) for p in m.parameters(recurse=False)), state, strict=True
    ):
        parameter.data.copy_(value)
    return Fit(before=before, after=best, tokens=len(x))


def _state(site: Site) -> list[Tensor]:
    return [p.detach().clone() for module in projections(site) for p in module.parameters(recurse=False)]
