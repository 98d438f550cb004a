"""Faults of older versions of other libraries, for which a test is skipped with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_glu.compat.private import Private


def needs_working_reset() -> None:
    """Skip where a cache that is reset goes on counting the tokens that it had (Transformers up to 5.14)."""
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    cache.reset()
    if cache.get_seq_length():
        pytest.skip("this Transformers' caches keep their length when they are reset")


def generate(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return what ``model.generate`` does; skip where looking up in the prompt wants a token of the end (5.6)."""
    try:
        return model.generate(*args, **kwargs)
    except TypeError as error:
        if "prompt_lookup_num_tokens" in kwargs and "isin()" in str(error):
            pytest.skip("this Transformers' prompt lookup needs an EOS token")
        raise


def needs(row: Private) -> None:
    """Skip where the installed version lacks what a row of compat names."""
    if not row.is_present():
        pytest.skip(str(row.missing()))
