"""How open a model's gates are at each token, and what they remember.

With g ``[B, T, W]`` the pre-activation of a gate, and s and z those of ``stateful_N``:

    openness = mean_w sigmoid(g)    state = mean_w s_t, which has read token t    shift = mean_w |z - g|

Shapes: B sequences, T tokens of all forward passes, W channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_glu.activation import OwnedActivation
from hf_glu.activation.context import Reading
from hf_glu.activation.context.hooks import by_name, cache_of, stack_and_blocks
from hf_glu.activation.context.reading import read
from hf_glu.activation.context.states import load_state, tokens_seen
from hf_glu.activation.kernels.formulas import split_gate_up
from hf_glu.activation.kernels.scan import decays, stateful
from hf_glu.activation.stateful import Memory
from hf_glu.compat.of_torch import GRAPH_TASK
from hf_glu.errors import DataError, NoSiteError
from hf_glu.ffn.identify import describe_site
from hf_glu.ffn.mixers import gate_begin
from hf_glu.ffn.sites import Site, convertible_sites


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


class RecordedGates:
    """What `record_gates` gives."""

    def __init__(self, gates: list[_Gate]) -> None:
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


@dataclass(eq=False)
class _Pass:
    """One forward pass of a stack: its tokens, and what a gate measured in it, ``[measures, B, tokens]`` a call."""

    reading: Reading | None
    calls: list[Tensor] = field(default_factory=list)

    def add(self, means: Tensor) -> None:
        """Take ``[measures, B, tokens]``; or ``[measures, N]``, where the tokens of all sequences are in one row."""
        if means.ndim == 2:
            reading = self.reading
            whole = reading is not None and means.shape[1] == reading.batch * reading.length
            means = means.reshape(len(means), reading.batch if reading is not None and whole else 1, -1)
        self.calls.append(means)

    def runs(self) -> tuple[Tensor, ...]:
        """Return ``[measures, B, T]`` for each time that the layer ran: several, where layers share it."""
        if not self.calls:
            return ()
        whole, reading = torch.cat(self.calls, -1), self.reading  # FFNs may run in chunks of the sequence
        if reading is None or whole.shape[1] != reading.batch or whole.shape[2] % reading.length:
            return (whole,)  # a stack that pads or pools its tokens by itself: which are padding isn't known
        runs = whole.split(reading.length, -1)
        return runs if reading.valid is None else tuple(run.masked_fill(~reading.valid, torch.nan) for run in runs)


class _Gate:
    """What one site measures."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        described = describe_site(model, site)
        keys = {"layer": "name", "index": "layer", "stack": "stack", "kind": "kind", "activation": "activation"}
        self.about = {key: described[name] for key, name in keys.items()}
        self.site, self.memory = site, _memory(site)
        self.stack = stack_and_blocks(model, site.name)[0]
        self.passes: list[_Pass] = []
        self.start: Tensor | None = None

    def watch(self) -> Iterator[RemovableHandle]:
        """Hook the modules that see the gate's pre-activation, and the model that knows its tokens."""
        yield self.stack.register_forward_pre_hook(self.begin, with_kwargs=True)
        act = self.site.act
        if self.memory is not None:
            yield self.memory.register_forward_pre_hook(self.before_memory)
            yield self.memory.register_forward_hook(lambda memory, args, z: self.add(args[0], z))
        elif self.site.kind == "mixer":  # whose activation is its convolution's, too
            yield self.site.in_proj.register_forward_hook(lambda in_proj, args, out: self.add(self.of_mixer(out)))
        elif isinstance(act, OwnedActivation) and act.gated:
            yield act.register_forward_pre_hook(lambda act, args: self.add(split_gate_up(args[0])[0]))
        else:
            yield act.register_forward_pre_hook(lambda act, args: self.add(args[0]))

    def begin(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin with another forward pass."""
        inputs = by_name(stack, args, kwargs)
        reading = read(inputs, partial(tokens_seen, cache_of(inputs)))
        if reading is not None and reading.valid is not None:
            reading.valid = reading.valid.to("cpu", copy=True)
        self.passes.append(_Pass(reading))

    def before_memory(self, memory: Memory, args: tuple[Any, ...]) -> None:
        """Keep the state that the memory is about to go on from."""
        self.start = load_state(memory.cache(), memory.slot)

    def of_mixer(self, projected: Tensor) -> Tensor:
        """Return g from a mixer's in-projection."""
        begin = gate_begin(self.site.anchor)
        return projected[..., begin : begin + self.site.width]

    @torch.no_grad()
    def add(self, g: Tensor, z: Tensor | None = None) -> None:
        """Take the pre-activation, ``[B, T, W]`` or all sequences' tokens in one row ``[N, W]``."""
        if GRAPH_TASK.find()() != -1:
            return  # computed once more in the backward pass
        if not self.passes:  # the layer was called without its model
            self.passes.append(_Pass(None))
        wide = g.to(torch.promote_types(g.dtype, torch.float32))
        measures = [wide.sigmoid()]
        if z is not None and self.memory is not None:
            x = self.memory.sequences(g)
            states, shift = _states(self.memory, x, self.start), (z.to(wide.dtype) - wide).abs()
            measures = [each.reshape(x.shape) for each in (*measures, states, shift)]
        self.passes[-1].add(torch.stack([measure.mean(-1) for measure in measures]).float().cpu())

    def records(self) -> Iterator[GateRecord]:
        """Yield a record for each time that the layer runs in a forward pass."""
        passes = [runs for each in self.passes if (runs := each.runs())]
        if len(sizes := sorted({run.shape[1] for runs in passes for run in runs})) > 1:
            raise DataError(
                f"batches of {' and '.join(map(str, sizes))} sequences can't be appended: record each in its own block"
            )
        for number in range(max(map(len, passes), default=0)):
            openness, *more = torch.cat([runs[number] for runs in passes if len(runs) > number], -1)
            state, shift = more or (None, None)
            name = self.about["layer"] + (f" ({number + 1})" if number else "")
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
    watched = [_Gate(model, site) for site in convertible_sites(model) if _has_gate(site)]
    if not watched:
        raise NoSiteError(
            f"{type(model).__name__} has no gates to record: hf_glu.convert(model, NAME) gives its FFNs some "
            "(those of experts aren't recorded: hf_glu.expert_statistics shows the routers)"
        )
    with ExitStack() as hooks:
        for gate in watched:
            for handle in gate.watch():
                hooks.callback(handle.remove)
        yield RecordedGates(watched)


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
