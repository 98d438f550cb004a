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


class StateCache(InPlace):
    """What a cache becomes; ``hf_glu_states`` are ``[B, S, W]``, the newest last."""

    hf_glu_states: dict[str, Tensor]

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
        count = abs(int(tokens_to_remove))
        for state in self.hf_glu_states.values():
            if count >= state.shape[1]:
                raise OptionError(
                    f"{count} tokens can't be taken back: the cache keeps the states of the last {ROLLBACK} "
                    f"({state.shape[1] - 1} here); draft fewer tokens"
                )
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if count:
            _change(self, lambda state: state[:, :-count])


def _change(cache: StateCache, function: Callable[[Tensor], Tensor]) -> None:
    cache.hf_glu_states = {slot: function(state) for slot, state in cache.hf_glu_states.items()}


def load_state(cache: Any, slot: str) -> Tensor | None:
    """Return the newest state of ``slot``, ``[B, W]``; None where there is none yet."""
    states = getattr(cache, "hf_glu_states", None)
    if not states or slot not in states:
        return None
    state: Tensor = states[slot][:, -1]
    return state


def store_states(cache: Any, slot: str, states: Tensor) -> None:
    """Add the states after each of some tokens, ``[B, T, W]``, to ``slot``."""
    if not hasattr(cache, "hf_glu_states"):
        cache.hf_glu_states = {}
        become(cache, StateCache)
    if not isinstance(cache, DynamicCache):  # of fixed size, and nothing is ever taken back from it
        cache.hf_glu_states[slot] = states[:, -1:].clone()
        return
    before = cache.hf_glu_states.get(slot)
    if before is None:
        before = torch.zeros_like(states[:, :1])
    kept = torch.cat([before, states[:, -ROLLBACK - 1 :]], dim=1)[:, -ROLLBACK - 1 :]
    cache.hf_glu_states[slot] = kept
