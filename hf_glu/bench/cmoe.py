"""CMoE as its paper has it, and the limit of all such methods: what `hf_glu.bench.carving` compares ours with.

Both leave the FFN as it is and switch units off, which gives what experts would give, at a dense FFN's cost.

CMoE (https://arxiv.org/abs/2502.04416), for each FFN: the units h(x) of normalised inputs and weights; a token's
`ACTIVE` largest |h| are active, columns of 0 and 1 for the units; those of the highest rates are always on; the others
are assigned, as many to each, to the columns of the next highest rates by their L1 distance (here the surest first; the
paper solves the assignment); a group's representative is the unit nearest to its mean column; groups are chosen by
|h(x)| of the representatives.

Shapes: T tokens, H hidden size, W units, E groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from hf_glu.conversion.experts.copying import Source, read_source
from hf_glu.conversion.experts.splitting.carving import balanced, strengths, strongest
from hf_glu.conversion.work import Work
from hf_glu.errors import OptionError
from hf_glu.ffn.expert_sites import own_module
from hf_glu.ffn.forward import ffn_units
from hf_glu.ffn.linear import weight_rows
from hf_glu.ffn.sites import Site, convertible_sites

ACTIVE = 10
Chooser = Callable[[Tensor, Tensor], Tensor]


class SwitchedFFN(nn.Module):
    """out(h(x) * on(x, h)): an FFN of which each token uses some units.

    Args:
        site: the FFN.
        choose: returns which units are on, ``[T, W]``, of inputs ``[T, H]`` and units ``[T, W]``.
    """

    def __init__(self, site: Site, choose: Chooser) -> None:
        super().__init__()
        self.inner, self._site, self._choose = site.anchor, site, choose

    def forward(self, x: Tensor) -> Tensor:
        """Return the FFN's output with some units off."""
        tokens = x.reshape(-1, x.shape[-1])
        units = ffn_units(self._site, tokens)
        out: Tensor = self._site.out_proj((units * self._choose(tokens, units)).to(self._site.out_proj.weight.dtype))
        return out.view(x.shape)


def limit(model: nn.Module, share: float) -> None:
    """Leave each token the ``share`` of units that add most to its output: the most that any choice can keep."""
    for site in _sites(model):

        def choose(x: Tensor, units: Tensor, site: Site = site) -> Tensor:
            strength = strengths(units, weight_rows(site.out_proj))
            return strongest(strength, round(share * strength.shape[1]))

        _put(model, site, choose)


@torch.no_grad()
def cmoe(model: nn.Module, batches: list[dict[str, Tensor]], counts: tuple[int, int], top_k: int) -> None:
    """Choose units by CMoE's experts, made on ``batches`` from the first layer on."""
    sites = _sites(model)
    work = Work(model=model, batches=batches, sites=sites)
    for site in sites:
        source = read_source(model, site)
        _put(model, site, _Carved.of(source, work.inputs_ahead(site), counts, top_k))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Carved:
    """CMoE's choice in one FFN: ``owner`` ``[W]`` is each unit's group, -1 for those always on."""

    source: Source
    owner: Tensor
    representatives: Tensor
    top_k: int

    @classmethod
    def of(cls, source: Source, x: Tensor, counts: tuple[int, int], top_k: int) -> _Carved:
        size = source.width // sum(counts)
        units = _normal_units(source, normalize(x, dim=1))
        active = strongest(units.abs(), ACTIVE).float()
        order = active.mean(0).argsort(descending=True, stable=True)
        rest = order[counts[0] * size :]
        columns = active[:, rest].T
        distance = torch.cdist(columns, columns[: counts[1]], p=1)
        group = balanced(-distance, size).to(x.device)
        found = []
        for number in range(counts[1]):
            own, mine = rest[group == number], columns[group == number]
            found.append(own[torch.cdist(mine.mean(0, keepdim=True), mine, p=1).argmin()])
        owner = torch.full((source.width,), -1, dtype=torch.long, device=x.device)
        owner[rest] = group
        return cls(source=source, owner=owner, representatives=torch.stack(found), top_k=top_k)

    def __call__(self, x: Tensor, units: Tensor) -> Tensor:
        scores = _normal_units(self.source, x, self.representatives).abs()
        always = torch.ones_like(scores[:, :1], dtype=torch.bool)
        return torch.cat([strongest(scores, self.top_k), always], dim=1)[:, self.owner]


def _normal_units(source: Source, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Return what units give whose in-rows are of length 1."""
    rows = source.rows.view(-1, source.width, x.shape[1])
    rows = normalize(rows if chosen is None else rows[:, chosen], dim=2)
    act: Any = source.site.act
    halves = [linear(x, half) for half in rows]
    return act(halves[0]) * halves[1] if len(halves) > 1 else act(halves[0])


def _sites(model: nn.Module) -> list[Site]:
    sites = convertible_sites(model)
    if not sites or not all(own_module(site) and not site.widened for site in sites):
        raise OptionError(f"the bench of carving is for models whose FFNs are modules: {type(model).__name__} isn't")
    return sites


def _put(model: nn.Module, site: Site, choose: Chooser) -> None:
    owner, _, name = site.name.rpartition(".")
    setattr(model.get_submodule(owner), name, SwitchedFFN(site, choose))
