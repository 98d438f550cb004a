"""Two kinds of text, as tokens, and the mean pre-activations of gates on them.

A forward pass for each batch; of each text and gate one mean over its tokens is kept, and that only where the method
needs the single texts.

Shapes: N texts, n of them in a batch, T tokens, W channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.config.traits import longest_text, token_id, vocabulary
from hf_glu.errors import DataError, HfGluError, OptionError, shown
from hf_glu.instruments.probe import forward_arguments
from hf_glu.instruments.recorder import Call, Reached, Watch, run_batches, watching

BATCH, LONGEST = 16, 128
SLACK, SHARE = 1024, 0.05  # unused ids of a vocabulary that is rounded up
EVERY = 4  # of so many texts one is held out
See = Callable[[Call, Tensor], None]
Watcher = Callable[[See], Watch]  # makes the watch of one place


@dataclass(frozen=True, kw_only=True, eq=False)
class Contrast:
    """Texts of two classes as ids.

    Attributes:
        texts: the ids of each text, the positive ones first.
        positive: how many are positive.
    """

    texts: Sequence[Sequence[int]]
    positive: int

    def sign(self, at: int) -> int:
        """Return the class of a text: 0 where it is positive, 1 where it is negative."""
        return int(at >= self.positive)

    def held_out(self, at: int) -> bool:
        """Return whether a text is one of those that accuracies are measured on."""
        return (at if at < self.positive else at - self.positive) % EVERY == EVERY - 1

    @property
    def pairs(self) -> int:
        """The number of pairs of a positive and a negative text."""
        return min(self.positive, len(self.texts) - self.positive)


def read_contrast(
    model: nn.Module, tokenizer: Any, positive: Sequence[str], negative: Sequence[str], *, max_length: int | None = None
) -> Contrast:
    """Tokenize two classes of texts for ``model``.

    Raises:
        DataError: a class without texts, texts that are none, or of which the tokenizer makes no or unknown tokens.
        OptionError: the tokenizer is another model's.
    """
    texts: list[list[int]] = []
    config: Any = getattr(model, "config", None)
    limit = min(max_length or LONGEST, longest_text(config) or LONGEST)
    for side, given in {"positive": positive, "negative": negative}.items():
        if isinstance(given, str):
            raise DataError(f"{side} is a list of texts, got one text: [{shown(given)}]")
        if not given:
            raise DataError(f"there are no {side} texts: a contrast needs both classes")
        if (odd := next((text for text in given if not isinstance(text, str) or not text.strip()), None)) is not None:
            raise DataError(f"{side} has {shown(odd)}, which is no text")
        found = tokenizer(list(given), truncation=True, max_length=limit)["input_ids"]
        check_tokenizer(config, tokenizer, found)
        if empty := [text for text, ids in zip(given, found, strict=True) if not ids]:
            raise DataError(f"the tokenizer makes no tokens of {shown(empty[0])}")
        texts += found
    return Contrast(texts=texts, positive=len(positive))


def check_tokenizer(config: Any, tokenizer: Any, texts: Sequence[Sequence[int]]) -> None:
    """Check that a tokenizer is a model's own, and knows the language of the texts.

    Raises:
        OptionError: its ids aren't those of the model.
        DataError: more than half of the tokens are unknown ones.
    """
    known, has = vocabulary(config), len(tokenizer)
    highest = max((max(ids) for ids in texts if ids), default=0)
    if known is not None and (highest >= known or has < known - max(SLACK, SHARE * known)):
        raise OptionError(
            f"the tokenizer has {has:,} tokens and the model {known:,}: it is another model's "
            f"({shown(getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__)})"
        )
    unknown, count = tokenizer.unk_token_id, sum(map(len, texts))
    if unknown is not None and sum(list(ids).count(unknown) for ids in texts) > count / 2:
        raise DataError("the tokenizer knows less than half of the texts' tokens: they are in a language that it lacks")


def batches(model: nn.Module, texts: Mapping[int, Sequence[int]], size: int) -> Iterator[tuple[list[int], Any]]:
    """Yield batches of texts of about one length, padded on the right: their numbers, and what the forward is given."""
    names, device = forward_arguments(model), next(model.parameters()).device
    fill = padding_id(getattr(model, "config", None))
    order = sorted(texts, key=lambda at: len(texts[at]))
    for begin in range(0, len(order), size):
        numbers = order[begin : begin + size]
        ids, mask = padded([texts[at] for at in numbers], device, fill=fill)
        yield numbers, {"input_ids": ids} | ({"attention_mask": mask} if "attention_mask" in names else {})


def padding_id(config: Any) -> int:
    """Return the token that a model of ``config`` takes for padding, by which some find a text's end; else 0."""
    found, known = token_id(config, "pad_token_id"), vocabulary(config)
    return 0 if found is None or (known is not None and found >= known) else found


def padded(
    texts: Sequence[Sequence[int]], device: torch.device, *, fill: int = 0, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the ids of texts, padded with ``fill`` on the right or ``left``, and which are no padding: ``[n, T]``."""
    length = max(map(len, texts))
    ids, mask = (torch.full((len(texts), length), value) for value in (fill, 0))
    for row, text in enumerate(texts):
        place = slice(length - len(text), None) if left else slice(len(text))
        ids[row, place], mask[row, place] = torch.tensor(list(text)), 1
    return ids.to(device), mask.to(device)


class TextMeans:
    """Means over tokens of what some places of a model see, text by text.

    Places that no whole text reaches (a vision tower's, routed experts, pooled layers) are left out.

    Args:
        model: the model.
        places: what watches each, by name.
        squares: whether means of squares are taken, too.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, Watcher], *, squares: bool = False) -> None:
        self.model, self.squares = model, squares
        self.watches = [watcher(partial(self._see, name)) for name, watcher in places.items()]
        self.names, self.once = list(places), False
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}

    def run(self, texts: Mapping[int, Sequence[int]], size: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yield for each batch the numbers of its texts, and by place their means: ``[n, W]``, or ``[n, 2 W]``."""
        with watching(self.model, self.watches):
            for numbers, inputs in batches(self.model, texts, size):
                self.sums, self.counts, self.calls = {}, {}, {}
                self._run(inputs)
                if not self.calls:
                    raise OptionError(f"{type(self.model).__name__} gives none of {', '.join(self.names)} whole texts")
                # a layer that isn't shared is given each text once: nothing after the last one is needed
                self.names, self.once = list(self.sums), all(count == 1 for count in self.calls.values())
                yield numbers, {name: self.sums[name] / self.counts[name] for name in self.names}

    def _run(self, inputs: Mapping[str, Tensor]) -> None:
        try:
            run_batches(self.model, [inputs])
        except HfGluError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
            if "memory" in str(error):
                raise
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise OptionError(f"{type(self.model).__name__} doesn't run on {', '.join(inputs)} alone: {why}") from error

    def _see(self, name: str, call: Call, x: Tensor) -> None:
        tokens = call.tokens
        if not tokens.length or name not in self.names:
            return
        rows = tokens.texts(x.detach()).float()
        if self.squares:
            rows = torch.cat([rows, rows.square()], dim=-1)
        valid = rows.new_ones(rows.shape[:2]) if tokens.valid is None else tokens.valid.to(rows)
        found = torch.einsum("btw,bt->bw", rows, valid).cpu(), valid.sum(1, keepdim=True).cpu()
        for kept, value in zip((self.sums, self.counts), found, strict=True):
            kept[name] = kept[name] + value if name in kept else value
        self.calls[name] = self.calls.get(name, 0) + 1
        if self.once and len(self.calls) == len(self.names):
            raise Reached
