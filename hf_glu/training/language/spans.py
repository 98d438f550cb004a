"""Span corruption (T5, arXiv 1910.10683): which tokens are hidden, and the sentinels that stand for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from hf_glu.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTINEL = "<extra_id_{}>"


def find_sentinels(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a tokenizer's sentinels, in order.

    Raises:
        OptionError: it has none.
    """
    found = list(_sentinels(tokenizer))
    if not found:
        raise OptionError(f"span needs a tokenizer with the sentinels {SENTINEL.format(0)}, ..., such as T5's")
    return found


def _sentinels(tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    for number in count():
        token = tokenizer.convert_tokens_to_ids(SENTINEL.format(number))
        if token in (None, tokenizer.unk_token_id):
            return
        yield int(token)


def count_spans(length: int, share: float, mean: float) -> tuple[int, int]:
    """Return how many of ``length`` tokens, two at least, are hidden, and in how many spans."""
    hidden = min(max(1, round(length * share)), length - 1)
    return hidden, max(1, min(round(hidden / mean), hidden, length - hidden + 1))


def hide_spans(length: int, share: float, mean: float, draw: np.random.Generator) -> np.ndarray:
    """Return which of ``length`` tokens are hidden: ``share`` of them, in spans of ``mean`` tokens on average.

    One token at least is hidden, and one isn't; between two spans there is at least one. All ways are as likely.
    """
    if length < 2:
        return np.zeros(length, dtype=bool)
    hidden, spans = count_spans(length, share, mean)
    sizes, gaps = _parts(hidden, spans, draw), _parts(length - hidden + 2, spans + 1, draw)
    gaps[0], gaps[-1] = gaps[0] - 1, gaps[-1] - 1  # there may be none before the first span, and after the last
    alternating = [size for pair in zip(gaps, [*sizes, 0], strict=True) for size in pair]
    return np.repeat([False, True] * (spans + 1), alternating)


def _parts(total: int, parts: int, draw: np.random.Generator) -> list[int]:
    """Return ``parts`` positive numbers that add up to ``total``, each such list as likely as another."""
    cuts = np.sort(draw.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *cuts, total]).tolist()


def take_out(ids: Sequence[int], hidden: np.ndarray, sentinels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return a text without its spans, and its spans alone: in both a sentinel is in the place of what isn't there.

    The spans' begin with a sentinel, also where the text's first token is hidden: the n-th sentinel of the text stands
    for what follows the n-th one of the spans.
    """
    shown = np.concatenate([[True], ~hidden])  # as if a token that is shown came before
    return _replaced(ids, hidden, sentinels), _replaced([0, *ids], shown, sentinels)


def _replaced(ids: Sequence[int], out: np.ndarray, sentinels: Sequence[int]) -> list[int]:
    """Return ``ids`` with one sentinel in the place of each run of those that are ``out``."""
    found, number = [], 0
    for at, (token, gone) in enumerate(zip(ids, out, strict=True)):
        if not gone:
            found.append(token)
        elif at == 0 or not out[at - 1]:
            found.append(sentinels[number])
            number += 1
    return found
