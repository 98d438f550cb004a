"""Decoding with a model whose FFNs leave small entries out, beside the dense one: tokens a second, and perplexity."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from hf_glu.activation.context.hooks import CACHES
from hf_glu.bench.on_text import BATCH, BLOCK, OnText
from hf_glu.bench.options import Shape
from hf_glu.bench.running import DTYPES, BenchOptions, Cell, Claim, Contender
from hf_glu.conversion.sparsify import sparsify
from hf_glu.instruments.perplexity import next_token_perplexity
from hf_glu.training.language.blocks import IDS

TOKENS = (4096, 4096)  # of the calibration, and those held out
PROMPT, NEW = 8, 8
# share of the FFNs' weights that a token reads -> the largest ratio of a token's time to the dense model's
KEPT: dict[float, float | None] = {0.7: 1 / 1.15, 0.5: None, 0.3: None}
DENSE = "dense"


def model_cells(options: BenchOptions) -> Iterator[Cell]:
    """Yield the cell of a model, whose contenders keep different shares."""
    model = Decoding(options)
    model.check()
    shape: Shape = {"of": "model", "pass": "decode", "batch": 1, "dtype": options.dtype}
    claims = {name(keep): Claim(peers=(DENSE,), target=target) for keep, target in KEPT.items()}
    yield Cell(shape=shape, build=model.contenders, claims=claims)


def name(keep: float) -> str:
    """Return what the contender that keeps a share is called."""
    return f"{keep:.0%} kept"


class Decoding(OnText):
    """The model whose FFNs leave entries out, and its texts."""

    bench, tokens = "sparsity", TOKENS

    def contenders(self) -> dict[str, Contender]:
        """Return the dense model and the sparse ones, each with its perplexity, which is of float32."""
        calibration, held_out = ([{IDS: part} for part in each.split(BATCH)] for each in self.texts)
        made: dict[str, Contender] = {}
        for keep in (1.0, *KEPT):
            model = copy.deepcopy(self.model)
            report = sparsify(model, calibration, keep=keep)
            found, _ = next_token_perplexity(model, held_out)
            dense = made[DENSE].facts["perplexity"] if made else found
            facts = {"read": report.read if report else 1.0, "perplexity": found, "of dense": found / dense}
            step = Decoder(model.to(DTYPES[self.options.dtype]), self.texts[1][:1, :BLOCK])
            made[name(keep) if report else DENSE] = Contender(call=step, tokens=NEW, facts=facts)
        return made


def cache_in(output: Any) -> dict[str, Any]:
    """Return the cache that a model gave, as the argument that it goes on with: ``cache`` from Transformers 5.24 on."""
    return {name: output[name] for name in list(output) if name in CACHES}


class Decoder:
    """Decodes some tokens after a prompt that was read before.

    Args:
        model: a causal language model.
        ids: text, ``[1, T]``.
    """

    @torch.no_grad()
    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids
        self.cache = cache_in(model(input_ids=ids[:, :PROMPT], use_cache=True))

    @torch.no_grad()
    def __call__(self) -> None:
        """Decode."""
        cache = copy.deepcopy(self.cache)
        for at in range(PROMPT, PROMPT + NEW):
            self.model(input_ids=self.ids[:, at : at + 1], **cache, use_cache=True)
