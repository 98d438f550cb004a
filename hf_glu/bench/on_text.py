"""A causal language model that is measured on text: the model, and blocks of tokens to fit on and to measure on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_glu.bench.running import BenchOptions
from hf_glu.checkpoint.loading import load_model, load_tokenizer
from hf_glu.conversion.held_out import is_causal
from hf_glu.errors import OptionError
from hf_glu.training.language.blocks import IDS, Cutter
from hf_glu.training.language.reading import read_documents

BLOCK, BATCH = 512, 4
DOCUMENTS = 10_000  # at most, of which blocks are taken


@dataclass
class OnText:
    """The model of a bench, and its texts.

    Attributes:
        options: of the bench.
        bench: its name.
        tokens: of the calibration, and those held out, unless asked.
    """

    options: BenchOptions
    bench: ClassVar[str]
    tokens: ClassVar[tuple[int, int]]

    def check(self) -> None:
        """Raise OptionError where model or text are missing, the text is short, or the model predicts no next token."""
        if not self.options.model or not self.options.text:
            raise OptionError(f"the bench of {self.bench} needs --model, a causal language model, and --text, its text")
        if not is_causal(self.model):
            raise OptionError(f"{self.options.model} is no causal language model: {type(self.model).__name__}")
        self.texts  # noqa: B018  raises where there are too few

    @cached_property
    def model(self) -> Any:
        """The dense model, in float32."""
        return load_model(str(self.options.model), dtype=torch.float32).eval()

    @cached_property
    def texts(self) -> tuple[Tensor, Tensor]:
        """Blocks of tokens ``[blocks, 512]`` to calibrate on, and held-out ones."""
        return texts_of(self.options, self.tokens)


def texts_of(options: BenchOptions, default: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return blocks of tokens ``[blocks, 512]`` to calibrate on, and held-out ones, ``default`` tokens unless asked.

    Raises:
        OptionError: the text is too short.
    """
    sizes = (*options.sizes(default), *default[1:])[:2]
    wanted = [max(1, size // BLOCK) for size in sizes]
    tokenizer = load_tokenizer(str(options.model))
    cutter = Cutter(tokenizer=tokenizer, length=BLOCK, framed=False)

    def blocks(name: str | None, count: int) -> list[list[int]]:
        documents = read_documents([str(name)], column=None)
        cut = cutter.cut(documents.select(range(min(len(documents), DOCUMENTS))))
        if len(found := [ids for ids in cut[IDS] if len(ids) == BLOCK]) < count:
            raise OptionError(f"{name} has too few tokens: {count * BLOCK:,} are needed")
        return found

    if options.held_out:
        first, last = blocks(options.text, wanted[0]), blocks(options.held_out, wanted[1])
    else:
        both = blocks(options.text, sum(wanted))
        first, last = both[: -wanted[1]], both[-wanted[1] :]
    return _spread(first, wanted[0]), _spread(last, wanted[1])


def _spread(blocks: list[list[int]], count: int) -> Tensor:
    """Return ``count`` of the blocks, from all over the text."""
    return torch.tensor([blocks[number * len(blocks) // count] for number in range(count)])
