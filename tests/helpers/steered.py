"""Pico models and texts that a modulation is fitted on."""

from __future__ import annotations

from functools import cache
from typing import Any

import contexts
import torch
from pico import FAMILIES, make_native
from taskdata import BAD, FILLER, GOOD, make_tokenizer, vocabulary
from torch import Tensor

import hf_glu

NATIVE = ("llama", "phi3", "modernbert", "t5_v1_1")


@cache
def tokenizer() -> Any:
    """Return the tests' tokenizer."""
    return make_tokenizer()


def texts(count: int = 16) -> tuple[list[str], list[str]]:
    """Return positive and negative texts."""
    sides = []
    for words in (GOOD, BAD):
        fill = [FILLER[at % len(FILLER)] for at in range(count)]
        sides.append([f"{fill[at]} {words[at % len(words)]} {words[(3 * at + 1) % len(words)]}" for at in range(count)])
    return sides[0], sides[1]


def make(name: str, seed: int = 0, **more: Any) -> Any:
    """Return a pico model, loud enough to tell texts apart, whose vocabulary is the tokenizer's."""
    more = {"vocab_size": len(vocabulary()), **more}
    if name in contexts.mixers.MODELS:
        model = contexts.make(name)
    else:
        model = FAMILIES[name].make(seed=seed, **more) if name in FAMILIES else make_native(name, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not name.startswith("Mamba"):
                parameter.mul_(3)
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
    return model.eval()


def fit(model: Any, **more: Any) -> Any:
    """Return the modulation of the tests' texts."""
    return hf_glu.fit_modulation(model, tokenizer(), *texts(), **more)


def ids(*shape: int, seed: int = 0) -> Tensor:
    """Return random token ids."""
    return torch.randint(5, 60, shape, generator=torch.Generator().manual_seed(seed))
