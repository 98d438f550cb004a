"""Which units of an FFN go together, and how a router knows which groups a token needs: the maths of splitting.

A unit's strength at a token is |h_j| |w_j|, the size of what it adds to the output. The units that are strongest on the
whole are always on (CMoE, https://arxiv.org/abs/2502.04416). The others are ranked, too: so a router can leave weak
groups out whatever the token. Among those of about one rank, units go together that the same tokens need (MoEfication,
https://arxiv.org/abs/2110.01786; by the gates: ExpertWeaver, https://arxiv.org/abs/2602.15521).

Shapes: T tokens, H hidden size, W units, E groups, k of which a token uses.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_glu.conversion.fit.fitting import RIDGE, damped

ROUNDS = 10
STRONGEST = 4  # a token's strongest units are one in so many
BAND = 4  # groups whose units are compared with each other
STRENGTH, FLOOR = 1.0, 1e-3  # of the ridge of `Refit`


def strengths(units: Tensor, out_rows: Tensor) -> Tensor:
    """Return |h_j| |w_j| of units ``[T, W]`` and out-projection rows ``[H, W]``: ``[T, W]`` in float32."""
    return units.float().abs() * out_rows.float().norm(dim=0)


def output_sizes(units: Tensor, out_rows: Tensor) -> Tensor:
    """Return |y| of tokens, the sizes of their outputs without a bias: ``[T, 1]`` in float32."""
    return (units.float() @ out_rows.float().T).norm(dim=1, keepdim=True).clamp_min(1e-20)


def strongest(values: Tensor, count: int) -> Tensor:
    """Return which are among the ``count`` largest of each row of ``[T, W]``: booleans, ties in the columns' order."""
    rows = values.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, rows, True)


def ranked(strength: Tensor, sizes: Tensor) -> Tensor:
    """Return the units by how often they fire, and how strongly, the strongest first.

    A unit's score is its mean square strength over its token's ``sizes`` ``[T, 1]``, plus its mean square strength,
    both over their mean over the units: the second sees to the few tokens of huge outputs that attention rests on.
    """
    score = torch.zeros_like(strength[0])
    for values in (strength / sizes, strength):
        power = values.square().mean(0)
        score += power / power.mean().clamp_min(1e-30)
    return score.argsort(descending=True, stable=True)


def grouped(features: Tensor, order: Tensor, always: int, count: int) -> tuple[Tensor, list[Tensor]]:
    """Return the ``always`` first units in ``order`` and ``count`` groups of the others, each of equal size.

    `BAND` groups at a time are clusters, by their ``features`` ``[W, F]``, of the units that are next in order.
    """
    rest = order[always:].split(BAND * (len(order) - always) // count)
    size = (len(order) - always) // count
    groups = [band[own] for band in rest for own in balanced_clusters(features[band], len(band) // size)]
    return order[:always], groups


def relative(strength: Tensor) -> Tensor:
    """Return how much stronger each unit is at a token than on average: s / mean(s) - 1, ``[W, T]``."""
    return (strength / strength.mean(0).clamp_min(1e-20) - 1).T


def patterns(values: Tensor) -> Tensor:
    """Return at which tokens each unit is among the largest of |values| ``[T, W]``: 0 and 1, ``[W, T]``."""
    return strongest(values.abs(), max(1, values.shape[1] // STRONGEST)).float().T


def balanced_clusters(features: Tensor, count: int) -> list[Tensor]:
    """Return the indices of ``count`` clusters of equal size by the cosine of ``features`` ``[W, F]`` (k-means).

    Units take the nearest centre that has room, the surest first.
    """
    points = normalize(features, dim=1)
    size = len(points) // count
    centres = points[torch.linspace(0, len(points) - 1, count).long()]
    owner = torch.zeros(len(points), dtype=torch.long)
    for _ in range(ROUNDS):
        before, owner = owner, balanced(points @ centres.T, size)
        if torch.equal(owner, before):
            break
        centres = torch.stack([points[(owner == c).to(points.device)].mean(0) for c in range(count)])
    return [(owner == c).nonzero()[:, 0].to(features.device) for c in range(count)]


def balanced(near: Tensor, size: int) -> Tensor:
    """Return the group of each unit, ``size`` in each, by ``near`` ``[W, E]``: the nearest with room, surest first."""
    near = near.cpu()
    count = near.shape[1]
    best = near.topk(min(2, count), dim=1).values
    wishes = near.argsort(dim=1, descending=True, stable=True).tolist()
    owner, room = torch.zeros(len(near), dtype=torch.long), [size] * count
    for unit in (best[:, 0] - best[:, -1]).argsort(descending=True, stable=True).tolist():
        group = next(group for group in wishes[unit] if room[group])
        owner[unit] = group
        room[group] -= 1
    return owner


def group_norms(units: Tensor, out_rows: Tensor, parts: list[Tensor]) -> Tensor:
    """Return the size of what each group adds to the outputs of tokens: ``[T, E]`` in float32."""
    out = out_rows.float()
    return torch.stack([(units[:, part].float() @ out[:, part].T).norm(dim=1) for part in parts], dim=1)


def fit_router(x: Tensor, norms: Tensor) -> Tensor:
    """Return W ``[E, H]`` with the least |x W' - s|^2 (ridge), where s are a token's ``norms`` over their sum."""
    x, norms = x.double(), norms.double() / norms.double().sum(1, keepdim=True).clamp_min(1e-20)
    return torch.linalg.solve(damped(x.T @ x, RIDGE), x.T @ norms).T


def units_router(features: Tensor, gate_rows: Tensor, parts: list[Tensor]) -> Tensor:
    """Return W ``[E, H]`` without a fit: of each group the gate's row of its representative, of length 1.

    That is the unit whose ``features`` ``[W, F]`` are nearest to the group's mean (CMoE); how far its gate opens stands
    in for the strength of the group.
    """
    points, rows = normalize(features, dim=1), []
    for part in parts:
        centre = points[part].mean(0)
        rows.append(gate_rows[part[(points[part] @ centre).argmax()]].float())
    return normalize(torch.stack(rows), dim=1)


class Refit:
    """The out-projection that makes up for what the groups left out would have added: ridge regression.

    min |U V - R|^2 + `STRENGTH` * sum_j |U_j|^2 |V_j|^2, where U are the units ``[T, W]`` that are on, else 0, and R is
    what the units add that are off, both over the output's size at their token, so that every token counts alike.
    """

    def __init__(self, out_rows: Tensor) -> None:
        self.out = out_rows.float().T
        width, hidden = self.out.shape
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=self.out.device)
        self.cross = torch.zeros(width, hidden, dtype=torch.float64, device=self.out.device)

    def add(self, units: Tensor, on: Tensor) -> None:
        """Take in the units of some tokens, and which of them are on, both ``[T, W]``."""
        units = units.float()
        units = units / output_sizes(units, self.out.T)
        kept = units * on
        self.gram += (kept.T @ kept).double()
        self.cross += (kept.T @ ((units - kept) @ self.out)).double()

    def rows(self) -> Tensor:
        """Return the new rows ``[H, W]`` in float32; the old ones where nothing was off."""
        change = torch.linalg.solve(damped(self.gram, STRENGTH * FLOOR, own=STRENGTH), self.cross)
        return (self.out.double() + change).T.float()
