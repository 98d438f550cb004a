"""States of activations in Transformers' own caches.

A cache object is upgraded in place to a subclass of its own class that holds the states and does with them what it does
with keys and values: reorder for beam search, repeat, select, reset, take tokens back. So every kind of cache goes on
being what it is, and two generations with one model don't mix.

Shapes: B sequences, W channels, S states that are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hf_glu.compat.of_models import cropped
from hf_glu.errors import OptionError
from hf_glu.inplace import InPlace, become

ROLLBACK = 32  # tokens that can be taken back exactly


def self_attention(cache: Any) -> Any:
    """Return the cache of a decoder's own tokens."""
    return getattr(cache, "self_attention_cache", cache)


def tokens_seen(cache: Any) -> int | None:
    """Return how many tokens a cache has, None where it doesn't know."""
    if cache is None or not getattr(cache, "layers", None):
        return None
    try:
        return int(cache.get_seq_length())
    except ValueError:  # state-space layers only
        return None


class Trail:
    """The last states of one slot, the newest last: as they were stored ``[B, S, W]``, and each one since.

    Nothing is written into any of them.
    """

    def __init__(self, stored: Tensor) -> None:
        self.stored = stored
        self.since: list[Tensor] = []

    @property
    def states(self) -> Tensor:
        """What can be taken back, and the state before: ``[B, S, W]``."""
        kept = torch.cat([self.stored, *self.since], dim=1) if self.since else self.stored
        return kept[:, -ROLLBACK - 1 :]

    def newest(self) -> Tensor:
        """Return the newest state, ``[B, 1, W]``."""
        return self.since[-1] if self.since else self.stored[:, -1:]

    def add(self, state: Tensor) -> None:
        """Take one more state, ``[B, 1, W]``, which is the newest from then on."""
        self.since.append(state)
        if len(self.since) > ROLLBACK:  # nobody can go back to what was stored
            self.stored, self.since = torch.cat(self.since, dim=1), []


class StateCache(InPlace):
    """What a cache becomes; ``hf_glu_states`` are the states by the slots of what has them."""

    hf_glu_states: dict[str, Trail]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences for beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        _change(self, lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        _change(self, lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        _change(self, lambda state: state[indices.to(state.device)])

    def reset(self) -> None:
        """Forget all."""
        super().reset()  # type: ignore[misc]
        self.hf_glu_states.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back.

        Raises:
            OptionError: more than `ROLLBACK` of them, whose states are gone.
        """
        count = cropped(super().crop, tokens_to_remove, self.get_seq_length)  # type: ignore[misc, attr-defined]
        for trail in self.hf_glu_states.values():
            if count >= (kept := trail.states.shape[1]):
                raise OptionError(
                    f"{count} tokens can't be taken back: the cache keeps the states of the last {ROLLBACK} "
                    f"({kept - 1} here); draft fewer tokens"
                )
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if count:
            _change(self, lambda state: state[:, :-count])


def _change(cache: StateCache, function: Callable[[Tensor], Tensor]) -> None:
    cache.hf_glu_states = {slot: Trail(function(trail.states)) for slot, trail in cache.hf_glu_states.items()}


def trail_of(cache: Any, slot: str) -> Trail | None:
    """Return the states of ``slot``, None where there are none yet."""
    states: dict[str, Trail] | None = getattr(cache, "hf_glu_states", None)
    return states.get(slot) if states else None


def load_state(cache: Any, slot: str) -> Tensor | None:
    """Return the newest state of ``slot``, ``[B, W]``; None where there is none yet."""
    trail = trail_of(cache, slot)
    return None if trail is None else trail.newest()[:, 0]


def store_states(cache: Any, slot: str, states: Tensor) -> None:
    """Add the states after each of some tokens, ``[B, T, W]``, to ``slot``."""
    if not hasattr(cache, "hf_glu_states"):
        cache.hf_glu_states = {}
        become(cache, StateCache)
    if not isinstance(cache, DynamicCache):  # of fixed size, and nothing is ever taken back from it
        # contiguous, so that a compiled step finds it as it left it
        cache.hf_glu_states[slot] = Trail(states[:, -1:].clone(memory_format=torch.contiguous_format))
        return
    trail = cache.hf_glu_states.get(slot)
    if trail is not None and states.shape[1] == 1 and not torch.compiler.is_compiling():  # which would count them
        trail.add(states)
        return
    before = torch.zeros_like(states[:, :1]) if trail is None else trail.states
    cache.hf_glu_states[slot] = Trail(torch.cat([before, states[:, -ROLLBACK - 1 :]], dim=1)[:, -ROLLBACK - 1 :])
