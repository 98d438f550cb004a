"""How open a model's gates are at each token, and what they remember.

With g ``[B, T, W]`` the pre-activation of a gate, and s and z those of ``stateful_N``:

    openness = mean_w sigmoid(g)    state = mean_w s_t, which has read token t    shift = mean_w |z - g|

Shapes: B sequences, T tokens of all forward passes, W channels.
"""

from __future__ import annotations

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
from hf_glu.config.showing import Shown, ShownTable, number
from hf_glu.errors import DataError, NoSiteError
from hf_glu.ffn.identify import describe_site
from hf_glu.ffn.sites import Site, convertible_sites
from hf_glu.instruments.pre_activations import watch_gate
from hf_glu.instruments.recorder import Call, Watch, watching
from hf_glu.instruments.tokens import Tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class GateRecord:
    """What one gate did, each tensor float32 ``[B, T]`` on the CPU, NaN at padding.

    Attributes:
        layer: name of the FFN or mixer; ``(2)`` follows where layers share it and it ran a second time.
        index, stack: the layer's number, and ``encoder``, ``decoder`` or None.
        kind: of its layout, as ``hf-glu sites`` has it.
        activation: its name.
        openness: mean of sigmoid(g) over the channels.
        state: mean of the state that has read the token, of both directions' where it looks both ways; None: no state.
        shift: mean of |z - g|; None: no state.
    """

    layer: str
    index: int
    stack: str | None
    kind: str
    activation: str
    openness: Tensor
    state: Tensor | None
    shift: Tensor | None

    @property
    def tokens(self) -> int:
        """How many tokens that are no padding the gate has seen."""
        return int((~self.openness.isnan()).sum())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, None for NaN."""
        about = {key: getattr(self, key) for key in ("layer", "index", "stack", "kind", "activation", "tokens")}
        return about | {key: _plain(getattr(self, key)) for key in ("openness", "state", "shift")}

    def means(self) -> dict[str, float | None]:
        """Return the means over all tokens, None of what isn't there."""
        measures = {"openness": self.openness, "state": self.state, "shift": self.shift}
        return {key: None if value is None else float(value.nanmean()) for key, value in measures.items()}

    def row(self) -> tuple[str, ...]:
        """Return its row of a table."""
        means = [number(value, ".3f" if key == "shift" else ".1%") for key, value in self.means().items()]
        return (self.layer, self.activation, str(self.tokens), *means)


class RecordedGates(Shown):
    """What `record_gates` gives."""

    def __init__(self, gates: list[_WatchedGate]) -> None:
        self._gates = gates

    @property
    def layers(self) -> list[GateRecord]:
        """The gates that have run, in the order of the model's modules.

        Raises:
            DataError: the forward passes had batches of different sizes, which can't be appended.
        """
        return [record for gate in self._gates for record in gate.records()]

    def to_dict(self) -> dict[str, Any]:
        """Return `layers` as rows of plain data."""
        return {"rows": [record.to_dict() for record in self.layers]}

    def _table(self) -> ShownTable:
        columns = ("layer", "activation", "#tokens", "#openness", "#state", "#shift")
        try:
            records, title = self.layers, f"{len(self._gates)} gates"
        except DataError as error:
            records, title = [], str(error)
        return ShownTable(title=title, columns=columns, rows=[record.row() for record in records])


@dataclass(eq=False)
class _Run:
    """What a gate measured in one forward pass of ``length`` tokens: ``[measures, B, tokens]`` a call."""

    length: int
    calls: list[Tensor] = field(default_factory=list)

    def layers(self) -> tuple[Tensor, ...]:
        """Return ``[measures, B, T]`` for each time that the layer ran: several, where layers share it."""
        whole = torch.cat(self.calls, -1)  # FFNs may run in chunks of the text
        return whole.split(self.length, -1) if self.length and not whole.shape[2] % self.length else (whole,)


class _WatchedGate:
    """What one site measures."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        described = describe_site(model, site)
        keys = {"layer": "name", "index": "layer", "stack": "stack", "kind": "kind", "activation": "activation"}
        self.about = {key: described[name] for key, name in keys.items()}
        self.site, self.memory = site, _memory(site)
        self.runs: list[_Run] = []
        self.start: Tensor | None = None

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
        self.start = load_state(self.memory.cache(), self.memory.slot)

    @torch.no_grad()
    def add(self, call: Call, g: Tensor, z: Tensor | None = None) -> None:
        """Take the pre-activation of the tokens of a call."""
        tokens = call.tokens
        wide = g.to(torch.promote_types(g.dtype, torch.float32))
        measures = [_means(tokens, wide.sigmoid())]
        if z is not None and self.memory is not None:
            states = _states(self.memory, self.memory.sequences(g), self.start)
            measures += [states.mean(-1), _means(tokens, (z.to(wide.dtype) - wide).abs())]
        found = torch.stack(measures).float()
        if tokens.valid is not None:
            found = found.masked_fill(~tokens.valid.to(found.device), torch.nan)
        if call.first:
            self.runs.append(_Run(tokens.length))
        self.runs[-1].calls.append(found.cpu())

    def records(self) -> Iterator[GateRecord]:
        """Yield a record for each time that the layer runs in a forward pass."""
        passes = [run.layers() for run in self.runs]
        if len(sizes := sorted({run.shape[1] for runs in passes for run in runs})) > 1:
            raise DataError(
                f"batches of {' and '.join(map(str, sizes))} sequences can't be appended: record each in its own block"
            )
        for time in range(max(map(len, passes), default=0)):
            openness, *more = torch.cat([runs[time] for runs in passes if len(runs) > time], -1)
            state, shift = more or (None, None)
            name = self.about["layer"] + (f" ({time + 1})" if time else "")
            yield GateRecord(**self.about | {"layer": name}, openness=openness, state=state, shift=shift)


@contextmanager
def record_gates(model: nn.Module) -> Iterator[RecordedGates]:
    """Record the gates of ``model`` within the block: of its FFNs, or of its mixers where it has no FFNs.

    Forward passes append along time: a prompt, then each token that is generated. The model computes what it computes
    without. What a backward pass computes again (gradient checkpointing) isn't recorded twice; tokens that assisted
    generation takes back stay, and beams stay in the order in which they ran. Gates inside of experts aren't recorded,
    since each sees other tokens.

    Raises:
        NoSiteError: there is no such gate.
    """
    watched = [_WatchedGate(model, site) for site in convertible_sites(model) if _has_gate(site)]
    if not watched:
        raise NoSiteError(
            f"{type(model).__name__} has no gates to record: hf_glu.convert(model, NAME) gives its FFNs some "
            "(those of experts aren't recorded: hf_glu.expert_statistics shows the routers)"
        )
    with watching(model, [watch for gate in watched for watch in gate.watches()]):
        yield RecordedGates(watched)


def _means(tokens: Tokens, values: Tensor) -> Tensor:
    """Return the mean over the channels of ``values``, by sequence and time: ``[B, T]``."""
    return tokens.texts(values.mean(-1, keepdim=True)).squeeze(-1)


def _memory(site: Site) -> Memory | None:
    return next((m for m in site.act.modules() if isinstance(m, Memory) and m.options is not None), None)


def _has_gate(site: Site) -> bool:
    return site.kind != "experts" and (site.native or site.widened or _memory(site) is not None)


def _states(memory: Memory, g: Tensor, start: Tensor | None) -> Tensor:
    """Return the states after each token: ``[B, T, W]``."""
    assert memory.options is not None
    reading = memory.current() or Reading(*g.shape[:2])
    decay = decays(memory.decay)
    run = partial(stateful, g, memory.alpha, memory.beta, decay, valid=reading.valid, restart=reading.restart)
    if memory.options.direction == "both":
        return torch.lerp(run()[1], run(reverse=True)[1], 0.5)
    return run(start=start)[1]


def _plain(values: Tensor | None) -> list[list[float | None]] | None:
    if values is None:
        return None
    return [[None if value != value else value for value in row] for row in values.tolist()]
