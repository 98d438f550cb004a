"""What a language model is trained to do: predict the next token, masked tokens, or the spans that were taken out.

What is masked depends on the seed, the pass over the data and the block only, so that one process and several, and a
resumed run, train on the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from hf_glu.errors import OptionError
from hf_glu.instruments.causal import check_causal, next_labels
from hf_glu.training.language.blocks import BEGINS, IDS, MASK, POSITIONS
from hf_glu.training.language.options import LanguageOptions
from hf_glu.training.language.spans import count_spans, find_sentinels, hide_spans, take_out
from hf_glu.training.loop.examples import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

IGNORED = -100
VALIDATION = -1  # in place of the pass over the data: the same masks each time
HIDDEN = "hidden"
Block = Mapping[str, Any]


class Objective(Protocol):
    """An objective: its name, the class of models that it trains, and what it makes of blocks.

    Attributes:
        name: on the command line.
        auto_class: the class of Transformers that loads a model for it.
        framed: whether each block has the special tokens of a text around it.
    """

    name: str
    auto_class: str
    framed: bool

    def targets(self, block: Block, draw: np.random.Generator) -> dict[str, list[int]]:
        """Return inputs and labels of a block; its labels are `IGNORED` where nothing is predicted."""
        ...

    def check(self, length: int) -> None:
        """Raise OptionError where blocks of ``length`` tokens are too long for it."""
        ...

    def of_model(self, model: Any) -> Objective:
        """Return the objective as this model is trained by it; raise OptionError where it can't be."""
        ...

    def given(self, batch: Batch) -> Batch:
        """Return a batch with its labels where the model's loss wants them."""
        ...


class Plain:
    """What most objectives are: of blocks of any length, for any model, with labels in their places."""

    def check(self, length: int) -> None:
        """Do nothing."""

    def of_model(self, model: Any) -> Self:
        """Return the objective."""
        return self

    def given(self, batch: Batch) -> Batch:
        """Return the batch."""
        return batch


@dataclass(frozen=True)
class NextToken(Plain):
    """Causal language modelling: each token of a block from those before it.

    Attributes:
        tokenizer, options: of the job.
        shifts: whether the model's loss compares logits with the next label, or with that of their own place (BART's).
    """

    tokenizer: PreTrainedTokenizerBase
    options: LanguageOptions
    shifts: bool = True
    name = "clm"
    auto_class = "AutoModelForCausalLM"
    framed = False

    def targets(self, block: Block, draw: np.random.Generator) -> dict[str, list[int]]:
        """Return the tokens as their own labels; the first one of a block, or of a document kept apart, isn't one."""
        ids = list(block[IDS])
        labels = [IGNORED, *ids[1:]]
        found = {IDS: ids, "labels": labels}
        if POSITIONS in block:
            places = list(block[POSITIONS])
            found[POSITIONS] = places
            found["labels"] = [label if place else IGNORED for label, place in zip(labels, places, strict=True)]
        return found

    def of_model(self, model: Any) -> NextToken:
        """Return the objective with what the model's loss does; raise OptionError for one that sees later tokens."""
        return replace(self, shifts=check_causal(model))

    def given(self, batch: Batch) -> Batch:
        """Return a batch whose loss is that of next tokens."""
        return batch if self.shifts else {**batch, "labels": next_labels(batch["labels"])}


@dataclass(frozen=True)
class MaskedTokens(Plain):
    """Masked language modelling (BERT, arXiv 1810.04805), masked anew in each pass over the data, by Transformers."""

    tokenizer: PreTrainedTokenizerBase
    options: LanguageOptions
    name = "mlm"
    auto_class = "AutoModelForMaskedLM"
    framed = True

    def __post_init__(self) -> None:
        if self.tokenizer.mask_token is None:
            raise OptionError("mlm needs a tokenizer with a mask token, which this one doesn't have")

    def targets(self, block: Block, draw: np.random.Generator) -> dict[str, list[int]]:
        """Return the tokens with some masked, which are the labels."""
        from transformers import DataCollatorForLanguageModeling

        whole = self.options.whole_words
        collator = DataCollatorForLanguageModeling(
            self.tokenizer, mlm_probability=self.options.mask, whole_word_mask=whole,
            **({"mask_replace_prob": 1.0, "random_replace_prob": 0.0} if whole else {}),
        )  # fmt: skip
        collator.generator = torch.Generator().manual_seed(int(draw.integers(2**62)))
        ids, labels = collator.torch_mask_tokens(
            torch.tensor([block[IDS]]), **self._special(block), **({"offset_mapping": _apart(block)} if whole else {})
        )
        return {IDS: ids[0].tolist(), "labels": labels[0].tolist()}

    def _special(self, block: Block) -> dict[str, Tensor]:
        special = self.tokenizer.get_special_tokens_mask(list(block[IDS]), already_has_special_tokens=True)
        return {"special_tokens_mask": torch.tensor([special])}


def _apart(block: Block) -> np.ndarray:
    """Return offsets in which words have a gap between them, which is how the collator tells them apart.

    A tokenizer's own offsets may count a space to the word after it, and then leave no gap.
    """
    ends = np.arange(1, len(block[IDS]) + 1) + np.cumsum(block[BEGINS])
    return np.stack([ends - 1, ends], axis=-1)[None]


@dataclass(frozen=True)
class Spans(Plain):
    """Span corruption (T5, arXiv 1910.10683): spans are replaced by sentinels, which the target says the content of."""

    tokenizer: PreTrainedTokenizerBase
    options: LanguageOptions
    name = "span"
    auto_class = "AutoModelForSeq2SeqLM"
    framed = True

    def __post_init__(self) -> None:
        _ = self.sentinels

    @cached_property
    def sentinels(self) -> list[int]:
        """The ids of the tokenizer's sentinels."""
        return find_sentinels(self.tokenizer)

    def check(self, length: int) -> None:
        """Check that there are sentinels for all spans of a block, and for what follows the last one."""
        _, spans = count_spans(length, self.options.mask, self.options.span)
        if spans >= len(self.sentinels):
            raise OptionError(
                f"a block of {length} tokens has {spans} spans, and the tokenizer {len(self.sentinels)} sentinels: "
                "give a smaller max_length or mask, or a larger span"
            )

    def targets(self, block: Block, draw: np.random.Generator) -> dict[str, list[int]]:
        """Return the tokens without their spans, and the spans as labels."""
        ids = list(block[IDS])
        end = [ids.pop()] if ids and ids[-1] == self.tokenizer.eos_token_id else []
        hidden = hide_spans(len(ids), self.options.mask, self.options.span, draw)
        inputs, labels = take_out(ids, hidden, self.sentinels)
        return {IDS: inputs + end, "labels": labels + end}


@dataclass(frozen=True)
class HiddenStates(Plain):
    """A teacher's hidden states, of all tokens of a document: for models without a language-model head (embedders)."""

    tokenizer: PreTrainedTokenizerBase
    options: LanguageOptions
    name = HIDDEN
    auto_class = "AutoModel"
    framed = True

    def __post_init__(self) -> None:
        if not self.options.teacher:
            raise OptionError("objective=hidden learns a teacher's hidden states: give the teacher")

    def targets(self, block: Block, draw: np.random.Generator) -> dict[str, list[int]]:
        """Return the tokens, each of which counts."""
        return {IDS: list(block[IDS]), "labels": list(block[IDS])}


OBJECTIVES: dict[str, Callable[[PreTrainedTokenizerBase, LanguageOptions], Objective]] = {
    each.name: each for each in (NextToken, MaskedTokens, Spans, HiddenStates)
}


def _classes() -> dict[str, Mapping[str, str]]:
    """Return the classes of each objective, by model type."""
    from transformers.models.auto import modeling_auto as auto

    return {
        "clm": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "mlm": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "span": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }


def objective_of_class(model_class: type) -> str:
    """Return the objective that a class of models has the head for; ``hidden`` where it has none."""
    return next((name for name, kind in _classes().items() if model_class.__name__ in kind.values()), HIDDEN)


def objective_of(config: PreTrainedConfig, asked: str, *, taught: bool = False) -> str:
    """Return the name of a model's objective: the one asked for, else that of its class.

    A model that is ``taught`` and whose class has no language-model head is like its teacher in hidden states.

    Raises:
        OptionError: the model can't be trained so.
    """
    kinds = _classes()
    able = [name for name, kind in kinds.items() if config.model_type in kind]
    named = (getattr(config, "architectures", None) or [""])[0]
    headless = taught and not any(named in kind.values() for kind in kinds.values())
    if asked == HIDDEN or (asked == "auto" and headless):
        return HIDDEN
    if asked != "auto":
        if asked not in able:
            ways = " or ".join(able) or "nothing"
            raise OptionError(f"{config.model_type} can't be trained by {asked}, but by {ways}")
        return asked
    if "CausalLM" in named and "clm" in able:
        return "clm"
    order = ("span", "mlm", "clm") if config.is_encoder_decoder else ("mlm", "clm")
    chosen = next((name for name in order if name in able), None)
    if chosen is None:
        raise OptionError(f"{config.model_type} is no language model: its class has none of {', '.join(kinds)}")
    return chosen


def collate(rows: list[dict[str, list[int]]], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Pad inputs and labels to the longest; a mask is left out where nothing is padding."""
    fill = {IDS: tokenizer.pad_token_id or 0, "labels": IGNORED, POSITIONS: 0}
    batch = {}
    for key in rows[0]:
        longest = max(len(row[key]) for row in rows)
        batch[key] = torch.tensor([row[key] + [fill[key]] * (longest - len(row[key])) for row in rows])
    lengths = torch.tensor([len(row[IDS]) for row in rows])
    if bool((lengths != lengths[0]).any()):
        batch[MASK] = (torch.arange(batch[IDS].shape[1]) < lengths[:, None]).long()
    return batch
