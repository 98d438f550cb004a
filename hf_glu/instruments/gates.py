"""How open a model's gates are at each token, and what they remember.

With g ``[B, T, W]`` the pre-activation of a gate, and s and z those of ``stateful_N``:

    openness = mean_w sigmoid(g)    state = mean_w s_t, which has read token t    shift = mean_w |z - g|

Shapes: B sequences, T tokens of all forward passes, W channels.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.context import Reading
from hf_glu.activation.context.states import load_state
from hf_glu.activation.kernels.scan import decays, stateful
from hf_glu.activation.stateful import Memory
from hf_glu.errors import DataError, NoSiteError
from hf_glu.ffn.expert_sites import own_sites
from hf_glu.ffn.experts import ExpertFFN
from hf_glu.ffn.identify import describe_site
from hf_glu.ffn.sites import Site, find_banks
from hf_glu.instruments.expert_gates import bank_activations, expert_openness
from hf_glu.instruments.expert_tokens import sent
from hf_glu.instruments.pre_activations import watch_gate
from hf_glu.instruments.recorded import GateRecord, RecordedGates
from hf_glu.instruments.recorder import Call, Watch, watching
from hf_glu.instruments.steering.places import EXPERTS, named_sites, place_of
from hf_glu.instruments.tokens import Tokens


@dataclass(eq=False)
class _Run:
    """What a gate measured in one forward pass of ``length`` tokens: ``[measures, B, tokens]`` a call."""

    length: int
    calls: list[Tensor] = field(default_factory=list)

    def layers(self) -> tuple[Tensor, ...]:
        """Return ``[measures, B, T]`` for each time that the layer ran: several, where layers share it."""
        whole = torch.cat(self.calls, -1)  # FFNs may run in chunks of the text
        return whole.split(self.length, -1) if self.length and not whole.shape[2] % self.length else (whole,)


class _Recorded:
    """What was measured of one gate."""

    def __init__(self, place: str, about: dict[str, Any], ran: set[bool]) -> None:
        self.place, self.about, self.ran = place, about, ran
        self.thread = threading.get_ident()
        self.runs: dict[bool, list[_Run]] = {True: [], False: []}  # of this thread, and of others

    def keep(self, call: Call, found: Tensor) -> None:
        """Keep the measures of the tokens of a call, ``[measures, B, t]``."""
        tokens, mine = call.tokens, threading.get_ident() == self.thread
        if tokens.valid is not None:
            found = found.masked_fill(~tokens.valid.to(found.device), torch.nan)
        self.ran.add(mine)
        if call.first:
            self.runs[mine].append(_Run(tokens.length))
        self.runs[mine][-1].calls.append(found.cpu())

    def records(self) -> Iterator[GateRecord]:
        """Yield a record for each time that the layer runs in a forward pass."""
        passes = [run.layers() for run in self.runs[True in self.ran]]
        if len(sizes := sorted({run.shape[1] for runs in passes for run in runs})) > 1:
            raise DataError(
                f"batches of {' and '.join(map(str, sizes))} sequences can't be appended: record each in its own block"
            )
        for time in range(max(map(len, passes), default=0)):
            openness, *more = torch.cat([runs[time] for runs in passes if len(runs) > time], -1)
            state, shift = more or (None, None)
            again = f" ({time + 1})" if time else ""
            about = self.about | {"layer": f"{self.about['layer']}{again}"}
            yield GateRecord(place=self.place + again, **about, openness=openness, state=state, shift=shift)


class _WatchedGate(_Recorded):
    """What one site measures."""

    def __init__(self, model: nn.Module, place: str, site: Site, ran: set[bool]) -> None:
        super().__init__(place, _about(model, site), ran)
        self.site, self.memory = site, _memory(site)
        self.start = threading.local()

    def watches(self) -> Iterator[Watch]:
        """Yield the watches of the modules that see the gate's pre-activation."""
        if self.memory is not None:
            yield Watch(module=self.memory, see=self.before_memory)
            yield Watch(module=self.memory, after=True, see=lambda call: self.add(call, call.x, call.output))
        else:
            yield watch_gate(self.site, self.add)

    def before_memory(self, call: Call) -> None:
        """Keep the state that the memory is about to go on from."""
        assert self.memory is not None
        self.start.state = load_state(self.memory.cache(), self.memory.slot)

    @torch.no_grad()
    def add(self, call: Call, g: Tensor, z: Tensor | None = None) -> None:
        """Take the pre-activation of the tokens of a call."""
        tokens = call.tokens
        wide = g.to(torch.promote_types(g.dtype, torch.float32))
        measures = [_means(tokens, wide.sigmoid())]
        if z is not None and self.memory is not None:
            states = _states(self.memory, self.memory.sequences(g), self.start.state)
            measures += [states.mean(-1), _means(tokens, (z.to(wide.dtype) - wide).abs())]
        self.keep(call, torch.stack(measures).float())


class _WatchedExperts(_Recorded):
    """What the experts of one layer measure: a family's own, or ours."""

    def __init__(self, model: nn.Module, site: Site, ran: set[bool]) -> None:
        super().__init__(f"{place_of(site)}.{EXPERTS}", _about(model, site), ran)
        self.site = site

    def watches(self) -> Iterator[Watch]:
        """Yield the watches of the experts, and of what says which of them a token is sent to."""
        yield from sent(self.site.anchor, self.add)

    def add(self, call: Call, experts: Tensor) -> None:
        """Take the tokens of a call, and the experts of each ``[T, k]``."""
        found = expert_openness(self.site.anchor, call.x.reshape(-1, call.x.shape[-1]), experts)
        self.keep(call, call.tokens.texts(found.unsqueeze(-1)).squeeze(-1).unsqueeze(0))


@contextmanager
def record_gates(model: nn.Module) -> Iterator[RecordedGates]:
    """Record the gates of ``model`` within the block: of its FFNs, or of its mixers where it has no FFNs.

    The gate of a dense FFN is what its activation is given, that of experts the mean of those that a token is sent to.
    Forward passes append along time: a prompt, then each token that is generated. The model computes what it computes
    without. What a backward pass computes again (gradient checkpointing) isn't recorded twice; tokens that assisted
    generation takes back stay, and beams stay in the order in which they ran. Within a block that steers the model, the
    gates are seen as they are steered; those of experts as they are before. The passes are those of this thread; where
    it runs none, those of the others, such as a streamer's.

    Raises:
        NoSiteError: the model has no FFN that hf_glu knows.
        OptionError: in a forward pass: weights of experts are offloaded.
    """
    watched = _watched(model)
    if not watched:
        raise NoSiteError(f"{type(model).__name__} has no gates to record: no FFN or mixer that hf_glu knows")
    with watching(model, [watch for gate in watched for watch in gate.watches()]):
        yield RecordedGates(watched)


def _watched(model: nn.Module) -> list[_WatchedGate | _WatchedExperts]:
    """Return what is to be watched, in the order of the model's modules."""
    ran: set[bool] = set()  # what any has recorded of: this thread, others
    found: list[_WatchedGate | _WatchedExperts] = [
        _WatchedGate(model, place, site, ran) for place, site in named_sites(model).items()
    ]
    found += [_WatchedExperts(model, site, ran) for site in (*find_banks(model), *own_sites(model))]
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda gate: order[gate.site.path])


def _about(model: nn.Module, site: Site) -> dict[str, Any]:
    """Return what a record says of a site."""
    described: dict[str, Any] = {"name": site.name, "layer": site.layer, "stack": site.stack}
    if isinstance(site.anchor, ExpertFFN):
        described |= site.anchor.to_dict()
    elif site.kind == EXPERTS:
        described |= {"kind": site.kind, "activation": bank_activations(site.anchor)}
    else:
        described |= describe_site(model, site)
    keys = {"layer": "name", "index": "layer", "stack": "stack", "kind": "kind", "activation": "activation"}
    return {key: described[name] for key, name in keys.items()}


def _means(tokens: Tokens, values: Tensor) -> Tensor:
    """Return the mean over the channels of ``values``, by sequence and time: ``[B, T]``."""
    return tokens.texts(values.mean(-1, keepdim=True)).squeeze(-1)


def _memory(site: Site) -> Memory | None:
    return next((m for m in site.act.modules() if isinstance(m, Memory) and m.options is not None), None)


def _states(memory: Memory, g: Tensor, start: Tensor | None) -> Tensor:
    """Return the states after each token: ``[B, T, W]``."""
    assert memory.options is not None
    reading = memory.current() or Reading(*g.shape[:2])
    decay = decays(memory.decay)
    run = partial(stateful, g, memory.alpha, memory.beta, decay, valid=reading.valid, restart=reading.restart)
    if memory.options.direction == "both":
        return torch.lerp(run()[1], run(reverse=True)[1], 0.5)
    return run(start=start)[1]
