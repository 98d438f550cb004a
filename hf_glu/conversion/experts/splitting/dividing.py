"""One FFN divided: its always-on units, its groups, their router and out-projection, put into fresh experts.

Shapes: T tokens, H hidden size, W units, E routed experts, k of which a token uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_glu.conversion.experts.copying import Source, start_at
from hf_glu.conversion.experts.splitting import carving
from hf_glu.conversion.fit.fitting import HELD_OUT
from hf_glu.ffn.experts import ExpertFFN
from hf_glu.ffn.experts.group import Bank, banks_of
from hf_glu.ffn.forward import ffn_units
from hf_glu.ffn.linear import weight_rows

SAMPLE = 4096  # tokens that units' activities are compared on
NUMBERS = 2**24  # of one chunk of contributions
SIMILARITIES = ("coactivation", "gate", "weights")
ROUTERS = ("fitted", "units")


@dataclass(frozen=True, kw_only=True, eq=False)
class Division:
    """How the units of an FFN are divided.

    Attributes:
        source: the FFN.
        always: the units that are always on.
        parts: those of each routed expert.
        router: ``[E, H]``.
        top_k: k.
        out: the out-projection's rows ``[H, W]``.
    """

    source: Source
    always: Tensor
    parts: list[Tensor]
    router: Tensor
    top_k: int
    out: Tensor

    def chunks(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tokens ``[n, H]`` and their units ``[n, W]``, in float32."""
        site = self.source.site
        for part in x.split(max(1, NUMBERS // ((len(self.parts) + 1) * len(self.out)))):
            yield part, ffn_units(site, part.to(site.in_proj.weight.dtype)).float()

    def scores(self, x: Tensor) -> Tensor:
        """Return the router's scores ``[T, E]``."""
        return x.float() @ self.router.float().T

    def on(self, x: Tensor) -> Tensor:
        """Return which units are on, ``[T, W]``."""
        chosen = carving.strongest(self.scores(x), self.top_k)
        on = torch.zeros(len(x), self.source.width, dtype=torch.bool, device=x.device)
        on[:, self.always] = True
        for number, part in enumerate(self.parts):
            on[:, part] = chosen[:, number : number + 1]
        return on

    def curve(self, x: Tensor) -> list[float]:
        """Return the output's relative errors on ``x`` with 1, 2, ... routed experts on."""
        error, total = torch.zeros(len(self.parts), dtype=torch.float64), 0.0
        old, bias = weight_rows(self.source.site.out_proj).float(), self.source.site.out_proj.bias
        out = self.out.float()
        for tokens, units in self.chunks(x):
            each = torch.stack([units[:, part] @ out[:, part].T for part in self.parts], dim=1)
            order = self.scores(tokens).argsort(dim=1, descending=True, stable=True)
            given = each.gather(1, order.unsqueeze(-1).expand_as(each)).cumsum(1).double()
            wanted = units @ old.T
            missing = (wanted - units[:, self.always] @ out[:, self.always].T).double()
            error += (given - missing.unsqueeze(1)).square().sum((0, 2)).cpu()
            total += float((wanted if bias is None else wanted + bias.float()).double().square().sum())
        return (error / max(total, 1e-300)).sqrt().tolist()


def divide(
    source: Source, x: Tensor, *, counts: tuple[int, int], top_k: int, similarity: str, router: str, refit: bool
) -> tuple[Division, list[float]]:
    """Divide an FFN by what it does on its inputs ``x`` ``[T, H]``; return the curve of its error, too.

    Args:
        source, x, top_k: as above.
        counts: always-on and routed experts.
        similarity: what units go together by, of `SIMILARITIES`.
        router: which, of `ROUTERS`.
        refit: whether the out-projection may change where fewer than all experts are on. It does where that is better
            on held-out tokens.
    """
    held = max(1, int(HELD_OUT * len(x)))
    train, test = x[:-held], x[-held:]
    out = weight_rows(source.site.out_proj)
    sample = train[:SAMPLE].to(source.site.in_proj.weight.dtype)
    units = ffn_units(source.site, sample)
    strength, sizes = carving.strengths(units, out), carving.output_sizes(units, out)
    size = source.width // sum(counts)
    features = _features(source, sample, strength / sizes, similarity)
    always, parts = carving.grouped(features, carving.ranked(strength, sizes), counts[0] * size, counts[1])
    blank = x.new_zeros(counts[1], x.shape[1])
    made = Division(source=source, always=always, parts=parts, router=blank, top_k=top_k, out=out)
    if router == "units":
        made = replace(made, router=carving.units_router(features, source.rows[: source.width], parts))
    else:
        norms = torch.cat([carving.group_norms(units, out, parts) for _, units in made.chunks(train)])
        made = replace(made, router=carving.fit_router(train, norms))
    curve = made.curve(test)
    if refit and top_k < counts[1]:
        better = replace(made, out=_refitted(made, train))
        found = better.curve(test)
        made, curve = (better, found) if found[top_k - 1] < curve[top_k - 1] else (made, curve)
    return made, curve


def _features(source: Source, x: Tensor, strength: Tensor, similarity: str) -> Tensor:
    """Return what units are compared by: ``[W, F]`` in float32."""
    if similarity == "weights":
        rows = source.rows
        return rows.view(-1, source.width, rows.shape[1]).transpose(0, 1).flatten(1).float()
    if similarity == "gate":
        return carving.patterns(_gates(source, x).float())
    return carving.relative(strength)


def _gates(source: Source, x: Tensor) -> Tensor:
    """Return phi(g) of gated FFNs, of others the units: ``[T, W]``."""
    site, bias = source.site, source.bias
    if not source.gated:
        return ffn_units(site, x)
    gate = torch.nn.functional.linear(x, source.rows[: source.width], None if bias is None else bias[: source.width])
    up = torch.ones_like(gate)
    return site.act(torch.cat([gate, up], dim=-1)) if site.widened else site.act(gate)


def _refitted(made: Division, x: Tensor) -> Tensor:
    fit = carving.Refit(made.out)
    for tokens, units in made.chunks(x):
        fit.add(units, made.on(tokens))
    return fit.rows().to(made.out.dtype)


@torch.no_grad()
def write(made: ExpertFFN, division: Division) -> None:
    """Fill fresh experts with the units of a division, and their router."""
    routed, shared = banks_of(made.banks), banks_of(made.shared)
    always = division.always.chunk(shared[0].count) if shared else ()
    whole = division.source.site.out_proj.bias
    for bank, parts in zip((*routed, *shared), (division.parts, always), strict=False):
        for expert, units in enumerate(parts):
            _write_expert(bank, expert, units, division)
        if bank.out_bias is not None:  # as many parts of it as experts are on make it whole
            on = division.top_k if not shared else len(always) if bank in shared else None
            bank.out_bias.copy_(torch.zeros_like(bank.out_bias) if whole is None or on is None else whole / on)
        for act in bank.acts:
            start_at(act, division.source)
    made.router.weight.copy_(division.router.to(made.router.weight))


def _write_expert(bank: Bank, expert: int, units: Tensor, division: Division) -> None:
    source = division.source
    halves = torch.cat([units, units + source.width]) if source.gated else units
    bank.in_proj[expert] = source.rows[halves]
    bank.out_proj[expert] = division.out[:, units]
    if bank.in_bias is not None:
        bank.in_bias[expert] = 0 if source.bias is None else source.bias[halves]
