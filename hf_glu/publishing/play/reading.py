"""What a model's gates do on one text, as numbers: the text as typed, and as the model goes on with it.

Nothing of a text is kept: what is asked for is computed anew, and forgotten when it has been shown.

Shapes: L gates of a stack, T of its tokens.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from hf_glu.activation.stateful import Memory
from hf_glu.checkpoint.loading import load_model, load_tokenizer
from hf_glu.config.traits import longest_text
from hf_glu.errors import DataError
from hf_glu.instruments.gates import record_gates
from hf_glu.instruments.perplexity import next_token_perplexity
from hf_glu.instruments.probe import evaluating, with_decoder
from hf_glu.instruments.recorded import RecordedGates
from hf_glu.instruments.steering.places import named_sites
from hf_glu.publishing.modulations import GateModulation
from hf_glu.publishing.report.formats import label

MAX_TOKENS = 256  # more would not be seen
MAX_NEW = 64
SHOWN = ("openness", "state")
ALL = "model"  # the one stack of a model that isn't an encoder-decoder


@dataclass(frozen=True, kw_only=True, eq=False)
class StackGates:
    """What the gates of one stack did.

    Attributes:
        stack: ``encoder``, ``decoder`` or ``model``.
        ids: of its tokens, ``[T]``.
        tokens: those as they can be read.
        typed: how many of them were typed; the model has written the others.
        places: names of its gates.
        layers: their numbers.
        measures: openness, and state where a gate has one: ``[L, T]``.
    """

    stack: str
    ids: list[int]
    tokens: list[str]
    typed: int
    places: list[str]
    layers: list[int]
    measures: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class TextGates:
    """What a model did with one text.

    Attributes:
        stacks: what its gates did.
        written: what it wrote after the text; empty: nothing.
        perplexity: on the text as typed; None: it is no causal language model, or the text is one token.
    """

    stacks: list[StackGates]
    written: str
    perplexity: float | None

    def mean(self, measure: str) -> float | None:
        """Return the mean of a measure over all gates and tokens, None where no gate has it."""
        found = [stack.measures[measure].flatten() for stack in self.stacks if measure in stack.measures]
        values = torch.cat(found) if found else torch.empty(0)
        return float(values.nanmean()) if (~values.isnan()).any() else None


def difference(one: TextGates, other: TextGates) -> list[StackGates]:
    """Return ``other`` minus ``one``, where both have read the same tokens, by gates that both have.

    Of texts that go on differently, that is up to where they part. A stack without such tokens or gates isn't in it.
    """
    found = []
    for a, b in zip(one.stacks, other.stacks, strict=False):
        same = next((at for at, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y), None)
        count = min(len(a.ids), len(b.ids)) if same is None else same
        count = count if a.tokens[:count] == b.tokens[:count] else 0  # of another tokenizer
        places = [place for place in a.places if place in b.places]
        if a.stack != b.stack or not count or not places:
            continue
        rows = [[stack.places.index(place) for place in places] for stack in (a, b)]
        measures = {
            key: b.measures[key][rows[1], :count] - a.measures[key][rows[0], :count]
            for key in a.measures if key in b.measures
        }  # fmt: skip
        found.append(
            StackGates(
                stack=a.stack, ids=a.ids[:count], tokens=a.tokens[:count], typed=min(a.typed, count), places=places,
                layers=[a.layers[row] for row in rows[0]], measures=measures,
            )
        )  # fmt: skip
    return found


class Player:
    """A model that reads texts, one after the other.

    Args:
        source: local folder, GGUF file or Hub id.

    Raises:
        CheckpointError: it or its tokenizer can't be loaded.
        NoSiteError: it has no gates.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.tokenizer = load_tokenizer(source)
        model: Any = load_model(source, dtype=torch.float32)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(self.device).eval()
        with record_gates(model):
            pass  # which says that there are none
        self._lock = Lock()

    @property
    def writes(self) -> bool:
        """Whether it can go on with a text."""
        return bool(self.model.can_generate())

    @property
    def whole(self) -> bool:
        """Whether it has an encoder and a decoder."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @property
    def remembers(self) -> bool:
        """Whether any of its gates has a state."""
        return any(isinstance(module, Memory) for module in self.model.modules())

    @property
    def layers(self) -> int:
        """How many layers have gates that can be steered."""
        return 1 + max((site.layer for site in named_sites(self.model).values()), default=-1)

    def read(self, text: str, *, new_tokens: int = 0, steered: GateModulation | None = None) -> TextGates:
        """Read a text, go on with it where that is asked for, and return what the gates did on all of it.

        Args:
            text: the text; its first `MAX_TOKENS` tokens are read.
            new_tokens: the most that it writes, each the likeliest one.
            steered: a modulation that is on; None: none.

        Raises:
            DataError: the tokenizer makes no tokens of the text.
        """
        with self._lock, evaluating(self.model), self._steered(steered):
            inputs = self._encode(text, new_tokens)
            typed = inputs["input_ids"]
            written = self._write(inputs, new_tokens)
            known = None if self.whole or not self.writes or typed.shape[1] < 2 else next_token_perplexity(
                self.model, [{"input_ids": typed}])[0]  # fmt: skip
            stacks = self._gates(inputs, written)
        return TextGates(stacks=stacks, written=self._decode(written), perplexity=known)

    def _steered(self, steered: GateModulation | None) -> AbstractContextManager[None]:
        return nullcontext() if steered is None else steered.on(self.model)

    def _encode(self, text: str, new_tokens: int) -> dict[str, Tensor]:
        longest = longest_text(self.model.config) or MAX_TOKENS
        room = longest if self.whole or not self.writes else max(1, longest - new_tokens)
        limit = min(MAX_TOKENS, self.tokenizer.model_max_length, room)
        encoded = self.tokenizer([text], truncation=True, max_length=limit, return_tensors="pt")
        if not encoded["input_ids"].numel():
            raise DataError(f"the tokenizer of {self.source} makes no tokens of this text")
        known = signature(self.model.forward).parameters
        return {key: value.to(self.device) for key, value in encoded.items() if key in known}

    def _write(self, inputs: dict[str, Tensor], new_tokens: int) -> Tensor:
        """Return the ids that the model writes after the text, of a decoder all that it reads: ``[T]``."""
        if not new_tokens or not self.writes:
            return torch.empty(0, dtype=torch.long)
        asked = {"do_sample": False, "num_beams": 1, "max_new_tokens": min(new_tokens, MAX_NEW)}
        out = self.model.generate(**inputs, **asked, pad_token_id=self.tokenizer.pad_token_id)[0]
        return out if self.whole else out[inputs["input_ids"].shape[1] :]

    def _gates(self, inputs: dict[str, Tensor], written: Tensor) -> list[StackGates]:
        """Return what the gates do on the text and what was written, read in one pass."""
        typed = inputs["input_ids"]
        read = {ALL: typed[0]}
        if self.whole:
            given = {**inputs, "decoder_input_ids": written.unsqueeze(0)} if len(written) else inputs
            inputs = with_decoder(self.model, given)
            read = {"encoder": typed[0], "decoder": inputs["decoder_input_ids"][0]}
        elif len(written):
            read = {ALL: torch.cat([typed[0], written.to(typed)])}
            inputs = {"input_ids": read[ALL].unsqueeze(0)}
        with record_gates(self.model) as gates:
            self.model(**inputs)
        return [
            _stack(
                gates, stack, ids.tolist(), self.tokenizer, 0 if stack == "decoder" and len(written) else typed.shape[1]
            )
            for stack, ids in read.items()
        ]

    def _decode(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)) if len(ids) else ""


def _stack(gates: RecordedGates, stack: str, ids: list[int], tokenizer: Any, typed: int) -> StackGates:
    """Return what the gates of one stack did: of a model with one only, all."""
    own = None if stack == ALL else stack
    records = [record for record in gates.layers if own in (None, record.stack)]
    read = {key: gates.tensor(key, stack=own)[:, 0, : len(ids)].float() for key in SHOWN}
    length = read["openness"].shape[1]
    tokens = [label(tokenizer.decode([token])) for token in ids]
    if length < len(ids):  # a model that pools its tokens
        ids, tokens = ids[:length], [str(place) for place in range(length)]
    return StackGates(
        stack=stack, ids=ids, tokens=tokens, typed=min(typed, length), places=[record.place for record in records],
        layers=[record.index for record in records],
        measures={key: value for key, value in read.items() if (~value.isnan()).any()},
    )  # fmt: skip
