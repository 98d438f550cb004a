"""What experts and gates do while a model trains: running sums over its own forward passes, taken from time to time.

Of a layer with experts, over the tokens since the sums were last taken that are no padding:

    load_e = pairs of a token and expert e / all pairs         load_entropy = -sum_e load_e ln load_e / ln E
    router_entropy = mean over tokens of the entropy of softmax(logits), in nats         dead: load_e = 0

so that a ``load_entropy`` of 1 is a load that is even. Of an FFN, with a ``[tokens, W]`` what its out-projection is
given, as in `hf_glu.instruments.activity`: the share of units that are dead, max |a| <= 1e-3 rms(a).

Only what hooks may look at without changing a bit is watched: not the activations inside of experts.

Shapes: T tokens, E experts, k experts a token, W units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import log, sqrt
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_glu.compat.of_models import EXPERT_PARALLEL
from hf_glu.errors import NoSiteError, OptionError
from hf_glu.ffn.experts.ffn import ExpertFFN, find_experts
from hf_glu.ffn.experts.recorded import NativeRouter, router_of
from hf_glu.ffn.experts.router import Routing
from hf_glu.ffn.forward import projections
from hf_glu.ffn.sites import Site, find_banks, find_sites, follow, layer_of
from hf_glu.instruments.activity import THRESHOLD
from hf_glu.instruments.expert_tokens import routed, sent
from hf_glu.instruments.recorder import Call, Watch, watching
from hf_glu.instruments.routing import stack_of

MORE = 4  # sums beside those of each expert


class WatchedExperts(TypedDict):
    """What one layer's experts did: ``dead`` are their numbers; no entropy where a family doesn't say its logits."""

    site: str
    layer: int
    stack: str | None
    tokens: int
    top_k: int
    load: list[float]
    load_entropy: float
    router_entropy: float | None
    dead: list[int]


class WatchedGates(TypedDict):
    """What the units of one FFN did: ``dead`` is their share."""

    site: str
    layer: int
    stack: str | None
    tokens: int
    units: int
    dead: float


class Watched(TypedDict):
    """What was watched since the last time, a row for each layer."""

    experts: list[WatchedExperts]
    gates: list[WatchedGates]


def _sums(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64)  # in which counts are exact


@dataclass(kw_only=True, eq=False)
class _LayerSums:
    """Sums of one layer ``[N]``, and the largest values ``[M]``, on the device where they are made."""

    name: str
    stack: str | None
    sums: Tensor
    peaks: Tensor = field(default_factory=lambda: torch.zeros(0))

    def begin(self, device: torch.device) -> None:
        """Move to the device of what comes."""
        if self.sums.device != device:
            kind = torch.float32 if device.type == "mps" else torch.float64
            self.sums, self.peaks = self.sums.to(device, kind), self.peaks.to(device)

    def take(self) -> tuple[Tensor, Tensor]:
        """Return sums and largest values, and begin anew."""
        found = self.sums.double().cpu().clone(), self.peaks.float().cpu().clone()
        self.sums.zero_()
        self.peaks.zero_()
        return found


class _ExpertSums(_LayerSums):
    """Of E experts: the pairs of each, those with none of them (a family's that do nothing), and three more.

    These are all tokens, those that were scored, and their entropies.
    """

    def send(self, experts: Tensor, kept: Tensor | None) -> None:
        """Add tokens that are sent to ``experts`` ``[T, k]``."""
        self.begin(experts.device)
        counts = self.sums.new_ones(len(experts)) if kept is None else kept.to(self.sums)
        pairs, most = counts.repeat_interleave(experts.shape[1]), len(self.sums) - MORE
        self.sums.scatter_add_(0, experts.reshape(-1).clamp(max=most), pairs)
        self.sums[-3] += counts.sum()

    def score(self, logits: Tensor, kept: Tensor | None) -> None:
        """Add the entropies of tokens with router logits ``[T, E]``."""
        self.begin(logits.device)
        counts = self.sums.new_ones(len(logits)) if kept is None else kept.to(self.sums)
        entropy = torch.special.entr(logits.detach().float().softmax(-1)).sum(-1)
        self.sums[-2] += counts.sum()
        self.sums[-1] += (entropy * counts).sum()

    def row(self, sums: Sequence[float]) -> WatchedExperts:
        """Return the row of sums over all processes."""
        *pairs, none, tokens, scored, entropy = sums
        total = sum(pairs)
        load = [each / max(total, 1.0) for each in pairs]
        uneven = -sum(share * log(share) for share in load if share)
        return {
            "site": self.name, "layer": layer_of(self.name), "stack": self.stack, "tokens": round(tokens),
            "top_k": round((total + none) / tokens), "load": load,
            "load_entropy": uneven / log(len(load)) if len(load) > 1 else 1.0,
            "router_entropy": entropy / scored if scored else None,
            "dead": [number for number, share in enumerate(load) if not share],
        }  # fmt: skip


class _UnitSums(_LayerSums):
    """Of W units: all tokens, the sum of squares of all units, and the largest size of each."""

    def see(self, a: Tensor, kept: Tensor | None) -> None:
        """Add what an out-projection is given, ``[..., W]``."""
        a = a.detach().reshape(-1, a.shape[-1])
        if not len(a):
            return
        self.begin(a.device)
        if kept is not None:
            a = a.masked_fill(~kept.to(a.device).unsqueeze(1), 0)
        self.sums[0] += len(a) if kept is None else kept.sum().to(a.device)
        wide = torch.promote_types(a.dtype, torch.float32)
        self.sums[1] += torch.linalg.vector_norm(a, dtype=wide).to(self.sums.dtype).square()
        self.peaks = torch.maximum(self.peaks, a.abs().amax(0).float())  # a sixth of that norm's time

    def row(self, sums: Sequence[float], peaks: Tensor) -> WatchedGates:
        """Return the row of sums and largest values over all processes."""
        tokens, energy = sums
        units = len(peaks)
        return {
            "site": self.name, "layer": layer_of(self.name), "stack": self.stack, "tokens": round(tokens),
            "units": units, "dead": float((peaks <= THRESHOLD * sqrt(energy / (tokens * units))).double().mean()),
        }  # fmt: skip


class TrainingStatistics:
    """Running sums over what a model's experts and FFNs do in passes in which it is in training mode.

    Attributes:
        counting: whether what comes counts.

    Raises:
        NoSiteError: the model has neither experts nor FFNs that hf_glu knows.
        OptionError: its weights are spread over processes by tensor or expert parallelism.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.counting = model, True
        ours, banks = find_experts(model), find_banks(model)
        sites = [site for site in find_sites(model) if site.kind != "experts"]
        if not ours and not banks and not sites:
            raise NoSiteError(f"{type(model).__name__} has neither experts nor FFNs to watch")
        spread = [bank.name for bank in banks if EXPERT_PARALLEL.of(bank.anchor, False)]
        if spread or (getattr(model, "tp_size", None) or 1) > 1:
            raise OptionError("watching counts whole layers, and this model's are spread over several processes")
        self._watches: list[Watch] = []
        self._parts: list[_ExpertSums | _UnitSums] = []
        for name, ffn in ours.items():
            self._watch_ours(name, ffn)
        for bank in banks:
            self._watch_bank(bank, router_of(model, bank.name))
        for site in sites:
            self._watch_units(site)

    def _watch_ours(self, name: str, ffn: ExpertFFN) -> None:
        sums = _ExpertSums(name=name, stack=stack_of(name), sums=_sums(ffn.options.count + MORE))

        def see(routing: Routing, call: Call) -> None:
            if self._counts():
                sums.send(routing.experts, call.tokens.kept)
                sums.score(routing.logits, call.tokens.kept)

        self._parts.append(sums)
        self._watches += routed(ffn, see)

    def _watch_bank(self, bank: Site, router: NativeRouter | None) -> None:
        count = len(follow(bank.anchor, bank.row.out_proj))
        sums = _ExpertSums(name=bank.name, stack=bank.stack, sums=_sums(count + MORE))

        def see(call: Call, experts: Tensor) -> None:
            if self._counts():
                sums.send(experts, call.tokens.kept)

        def score(found: NativeRouter, call: Call) -> None:
            if self._counts():
                sums.score(found.logits(call.output), call.tokens.kept)

        self._parts.append(sums)
        self._watches += sent(bank.anchor, see)
        if router is not None:
            self._watches.append(Watch(module=router.module, see=partial(score, router), after=True))

    def _watch_units(self, site: Site) -> None:
        sums = _UnitSums(name=site.name, stack=site.stack, sums=_sums(2), peaks=torch.zeros(site.width))

        def see(call: Call) -> None:
            if self._counts():
                sums.see(call.x, call.tokens.kept)

        self._parts.append(sums)
        self._watches.append(Watch(module=projections(site)[-1], see=see))

    def _counts(self) -> bool:
        return self.counting and self.model.training

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the model within the block."""
        with watching(self.model, self._watches):
            yield

    def take(self) -> Watched:
        """Return what was counted on all processes, which must all ask, and begin anew.

        A layer that never ran has no row.
        """
        taken = [part.take() for part in self._parts]
        sums, peaks = torch.cat([each for each, _ in taken]), torch.cat([each for _, each in taken])
        if dist.is_available() and dist.is_initialized():
            device = next(self.model.parameters()).device
            sums, peaks = sums.to(device), peaks.to(device)
            dist.all_reduce(sums)
            dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        found: Watched = {"experts": [], "gates": []}
        each = zip(
            self._parts, sums.cpu().split([len(a) for a, _ in taken]), peaks.cpu().split([len(b) for _, b in taken]),
            strict=True,
        )  # fmt: skip
        for part, own, largest in each:
            if isinstance(part, _ExpertSums) and own[-3]:
                found["experts"].append(part.row(own.tolist()))
            elif isinstance(part, _UnitSums) and own[0]:
                found["gates"].append(part.row(own.tolist(), largest))
        return found
