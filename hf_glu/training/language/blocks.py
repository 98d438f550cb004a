"""Documents as blocks of tokens: tokenized, joined end to end, and cut; or kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from hf_glu.errors import DataError, OptionError
from hf_glu.training.language.reading import TEXT, Documents

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

IDS, POSITIONS, BEGINS, BYTES = "input_ids", "position_ids", "begins_word", "bytes"
MASK = "attention_mask"  # of a batch: which tokens are no padding
TOGETHER = 10_000  # documents that are joined at once: their last block may be short
_SAMPLE = "a"

Columns = dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The special tokens that a tokenizer puts around a text."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """Find them by a short text, with and without."""
        inner = list(tokenizer(_SAMPLE, add_special_tokens=False)[IDS])
        whole = list(tokenizer(_SAMPLE)[IDS])
        at = next((i for i in range(len(whole) - len(inner) + 1) if whole[i : i + len(inner)] == inner), 0)
        return cls(prefix=tuple(whole[:at]), suffix=tuple(whole[at + len(inner) :]))

    def __len__(self) -> int:
        return len(self.prefix) + len(self.suffix)


@dataclass(frozen=True, kw_only=True)
class Cutter:
    """How documents become blocks.

    Attributes:
        tokenizer: the model's.
        length: tokens of a block, with special tokens.
        framed: whether each block begins and ends with the special tokens of a text, as encoders want it; else each
            document begins with those before a text, and ends with those after it, or with the token that ends a text.
        separate: whether a block has tokens of one document only (framed), or positions that begin again with each.
        words: whether it is kept which tokens begin a word.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int
    framed: bool
    separate: bool = False
    words: bool = False

    def __post_init__(self) -> None:
        if self.length < 8:
            raise OptionError(f"a block of {self.length} tokens is too short: give max_length, 8 at least")
        if self.words and not self.tokenizer.is_fast:
            raise OptionError("whole_words needs a fast tokenizer, which tells the word of each token")

    def cut(self, documents: Documents, *, workers: int = 1) -> Documents:
        """Return the blocks: `IDS`, with `POSITIONS` or `BEGINS` where they are kept, and the `BYTES` of the text.

        Raises:
            DataError: there is no text.
        """
        more = {"num_proc": workers} if workers > 1 and hasattr(documents, "num_rows") else {}
        tokens = documents.map(self.tokenize, batched=True, remove_columns=[TEXT], **more)
        blocks = tokens.map(self.join, batched=True, batch_size=TOGETHER, remove_columns=tokens.column_names)
        if hasattr(blocks, "num_rows") and not blocks.num_rows:
            raise DataError("there is no text in the data")
        return blocks

    def tokenize(self, batch: Columns) -> Columns:
        """Tokenize documents, without the special tokens around them."""
        texts = batch[TEXT]
        found = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        columns = {IDS: found[IDS], BYTES: [len(text.encode("utf-8", "replace")) for text in texts]}
        if self.words:
            columns[BEGINS] = [_begins(text, found[number]) for number, text in enumerate(texts)]
        return columns

    def join(self, batch: Columns) -> Columns:
        """Join tokenized documents end to end, and cut them into blocks."""
        frame = Frame.of(self.tokenizer)
        if self.framed:
            columns = {key: batch[key] for key in (IDS, BEGINS) if key in batch}
            size = self.length - len(frame)
            if not self.separate:
                columns = {key: [list(chain.from_iterable(value))] for key, value in columns.items()}
            pieces = {key: [p for value in values for p in _pieces(value, size)] for key, values in columns.items()}
            blocks: Columns = {IDS: [[*frame.prefix, *piece, *frame.suffix] for piece in pieces[IDS]]}
            if BEGINS in pieces:
                before, after = [True] * len(frame.prefix), [True] * len(frame.suffix)
                blocks[BEGINS] = [[*before, *piece, *after] for piece in pieces[BEGINS]]
        else:
            end = frame.suffix or ((self.tokenizer.eos_token_id,) if self.tokenizer.eos_token_id is not None else ())
            texts = [[*frame.prefix, *ids, *end] for ids in batch[IDS]]
            blocks = {IDS: _pieces(list(chain.from_iterable(texts)), self.length)}
            if self.separate:
                places = list(chain.from_iterable(range(len(text)) for text in texts))
                blocks[POSITIONS] = [_from_zero(piece) for piece in _pieces(places, self.length)]
            blocks = _without_single_tokens(blocks)
        # the text's bytes, where they belong to: on average
        total, tokens = sum(batch[BYTES]), sum(map(len, blocks[IDS])) or 1
        return {**blocks, BYTES: [total * len(ids) / tokens for ids in blocks[IDS]]}


def _begins(text: str, tokens: Encoding) -> list[bool]:
    """Return which tokens of a text begin a word: those that the tokenizer says, and those after a space.

    To some tokenizers (Gemma's, Llama's) a whole text is one word.
    """
    found, words = list[bool](), tokens.word_ids
    before, last = "", 0
    for at, (begin, end) in enumerate(tokens.offsets):
        own = text[begin:end]
        apart = own[:1].isspace() or before[-1:].isspace() or begin > last
        spaced = apart and not before.isspace()  # a space by itself belongs to the word after it
        found.append(at == 0 or spaced or words[at] is None or words[at] != words[at - 1])
        before, last = own, end
    return found


def _pieces(values: list[Any], size: int) -> list[list[Any]]:
    return [values[at : at + size] for at in range(0, len(values), size)]


def _from_zero(places: Sequence[int]) -> list[int]:
    """Return positions of a block, whose first document goes on from the block before, beginning with 0."""
    rest = next((at for at, place in enumerate(places) if place == 0), len(places))
    return [place - places[0] for place in places[:rest]] + list(places[rest:])


def _without_single_tokens(blocks: Columns) -> Columns:
    """Leave out blocks of one token, of which nothing is predicted."""
    kept = [number for number, ids in enumerate(blocks[IDS]) if len(ids) > 1]
    return {key: [values[number] for number in kept] for key, values in blocks.items()}
