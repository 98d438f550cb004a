"""Which tokens the rows are that experts are given: of expert FFNs of ours and of Transformers' own banks.

A router sends each token to k experts. The pairs of token and expert are sorted by expert, in the order of the tokens
within each, and the activation of a group of experts is given their rows one after the other, in one call or in one for
each expert. Padding among them is known from what the router, or the bank, was given.

Shapes: T tokens, k experts a token, N rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from hf_glu.errors import OptionError
from hf_glu.ffn.experts.ffn import ExpertFFN
from hf_glu.ffn.experts.group import banks_of
from hf_glu.ffn.experts.native import MixedBank, is_bank
from hf_glu.ffn.experts.router import Routing
from hf_glu.instruments.recorder import Batch, Call, Kept, Reached, Watch, run_batches, watching


@dataclass(eq=False)
class _Queue:
    """The tokens that a group of experts is yet to be given in a pass, and how many of them each expert gets."""

    rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    sizes: list[int] = field(default_factory=list)

    def take(self, count: int) -> Tensor | None:
        """Return the next ``count`` tokens: all of the group's, or an expert's. None: those it can't be."""
        while count and self.sizes and not self.sizes[0]:
            self.sizes.pop(0)
        if count == len(self.rows):
            self.sizes.clear()
        elif count and self.sizes[:1] == [count]:
            self.sizes.pop(0)
        elif count:
            return None
        taken, self.rows = self.rows[:count], self.rows[count:]
        return taken


class ExpertTokens:
    """Which rows that the activations inside of a model's experts are given are padding.

    Use its `watches` together with those of the activations, before them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, (ExpertFFN, MixedBank))]
        self._given: dict[int, Tensor | None] = {}  # by activation: which of the rows of its running call count
        self.acts = {id(act) for layer in self._layers for _, acts in _groups(layer) for act in acts}

    def watches(self) -> Iterator[Watch]:
        """Yield what must be watched."""
        for layer in self._layers:
            queues = _Queues(layer)
            yield from queues.watches()
            for number, (_, acts) in enumerate(_groups(layer)):
                for act in acts:
                    yield Watch(module=act, see=partial(self._begin, act, queues, number))

    def _begin(self, act: nn.Module, queues: _Queues, number: int, call: Call) -> None:
        self._given[id(act)] = queues.kept(number, len(call.x))

    def rows(self, act: nn.Module, x: Tensor) -> Tensor:
        """Return the rows of ``x`` ``[..., W]``, in the running call of ``act``, that are no padding: ``[N, W]``."""
        flat, kept = x.reshape(-1, x.shape[-1]), self._given.get(id(act))
        return flat if kept is None or len(kept) != len(flat) else flat[kept.to(flat.device)]


def _groups(layer: ExpertFFN | MixedBank) -> list[tuple[int, list[nn.Module]]]:
    """Return the numbers of experts, and the activations, of the groups of a layer; shared experts last, as 0."""
    if isinstance(layer, ExpertFFN):
        routed = [(bank.count, list(bank.acts)) for bank in banks_of(layer.banks)]
        return [*routed, *((0, list(bank.acts)) for bank in banks_of(layer.shared))]
    return [(group.count, [act]) for group, act in zip(layer.groups, layer.acts, strict=True)]


class _Queues:
    """The queues of one layer's groups, filled where its router has decided."""

    def __init__(self, layer: ExpertFFN | MixedBank) -> None:
        self.layer, self.counts = layer, [count for count, _ in _groups(layer)]
        self.shared = [bank.count for bank in banks_of(layer.shared)] if isinstance(layer, ExpertFFN) else []
        self.queues = [_Queue() for _ in self.counts]
        self.valid: Tensor | None = None

    def watches(self) -> Iterator[Watch]:
        yield from sent(self.layer, self.fill)

    def fill(self, call: Call, experts: Tensor) -> None:
        """Take the tokens that a layer is given, and their experts ``[T, k]``."""
        self.valid = call.tokens.kept
        order = experts.reshape(-1).argsort(stable=True)
        source = (order // experts.shape[1]).cpu()
        routed = [count for count in self.counts if count]
        sizes = torch.bincount(experts.reshape(-1), minlength=sum(routed)).tolist()
        self.queues, begin, first = [], 0, 0
        for count in routed:
            own = sizes[first : first + count]
            self.queues.append(_Queue(source[begin : begin + sum(own)], own))
            begin, first = begin + sum(own), first + count
        for count in self.shared:
            self.queues.append(_Queue(torch.arange(len(experts)).repeat(count), [len(experts)] * count))

    def kept(self, number: int, count: int) -> Tensor | None:
        """Return which of the next ``count`` rows of a group are no padding; None: all, or it isn't known."""
        rows = self.queues[number].take(count)
        return None if rows is None or self.valid is None else self.valid.cpu()[rows]


def routed(ffn: ExpertFFN, see: Callable[[Routing, Call], None]) -> Iterator[Watch]:
    """Yield the watches that call ``see`` with what the router of ``ffn`` decided, and the call of ``ffn``."""
    given = threading.local()  # two threads may run one model at once
    yield Watch(module=ffn, see=partial(setattr, given, "call"))
    yield Watch(module=ffn.router, see=lambda call: see(call.output, given.call), after=True)


def sent(layer: nn.Module, see: Callable[[Call, Tensor], None]) -> Iterator[Watch]:
    """Yield the watches that call ``see`` with the call of a layer, and with the experts ``[T, k]`` of its tokens."""
    if isinstance(layer, ExpertFFN):
        yield from routed(layer, lambda routing, call: see(call, routing.experts))
    elif isinstance(layer, MixedBank) and layer.copies is not None:  # which say which of them the tokens go to
        given = threading.local()
        yield Watch(module=layer, see=partial(setattr, given, "call"))
        yield Watch(module=layer.copies, see=lambda call: see(given.call, call.output[0]), after=True)
    else:
        yield Watch(module=layer, see=lambda call: see(call, call.inputs[1]))


def routed_inputs(model: nn.Module, layer: nn.Module, batches: Iterable[Batch], *, limit: int) -> tuple[Tensor, Tensor]:
    """Return the first tokens that experts are given on ``batches``, without padding.

    Args:
        model: the model.
        layer: an expert FFN of ours in it, or one of Transformers' own banks.
        batches: of its forward's arguments.
        limit: how many tokens are kept at most.

    Returns:
        The tokens ``[T, H]`` and the experts of each, ``[T, k]``.

    Raises:
        OptionError: ``layer`` is neither, or the model never runs it.
    """
    if not isinstance(layer, ExpertFFN) and not is_bank(layer):
        raise OptionError(f"{type(layer).__name__} has no experts that a router sends tokens to")
    tokens, experts = Kept(limit), Kept(limit)

    def see(call: Call, index: Tensor) -> None:
        tokens.see(call)
        experts.add(index if call.tokens.kept is None else index[call.tokens.kept.to(index.device)])
        if call.tokens.last:
            raise Reached

    with watching(model, sent(layer, see)):
        run_batches(model, batches, enough=lambda: tokens.full)
    if not tokens.parts:
        raise OptionError(f"the data never reach the experts of {type(layer).__name__}: give what its stack reads, too")
    return tokens.tensor(), experts.tensor()
