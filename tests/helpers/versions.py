"""Faults of older versions of other libraries, for which a test is skipped with the reason."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, DynamicCache, Trainer

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


def needs_continued_texts(found: torch.Tensor, whole: torch.Tensor) -> None:
    """Skip where a stock Mamba-2's own state begins anew when several tokens continue a text (up to 5.14)."""
    if (found - whole).abs().max() > 1e-3:
        pytest.skip("this Transformers' Mamba-2 begins anew when several tokens continue a text")


def needs_beams_with_a_cache(stock: Any, ids: torch.Tensor) -> None:
    """Skip where beams keep each other's states in a stock state-space model's cache (up to 5.14)."""
    cached, whole = (
        stock.generate(ids, num_beams=3, max_new_tokens=8, pad_token_id=0, use_cache=how) for how in (True, False)
    )
    if not torch.equal(cached, whole):
        pytest.skip("this Transformers' beam search leaves the cache of a state-space model as it is")


def needs_whole_graphs() -> None:
    """Skip where torch can't compile the wrappers of Transformers' own forwards in one graph (torch 2.6)."""

    def named(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if "x" in named.__code__.co_varnames else x

    try:
        torch.compile(named, backend="eager", fullgraph=True)(torch.ones(1))
    except torch._dynamo.exc.Unsupported:
        pytest.skip("this torch compiles no model of Transformers in one graph")


def needs_trainers_parts() -> None:
    """Skip where Trainer counts labels that nothing predicts, and leaves some losses of micro-batches whole (5.6)."""
    if "loss_is_scaled_for_ga" not in inspect.getsource(Trainer):
        pytest.skip("this Transformers' Trainer weighs micro-batches otherwise, whatever the loss")


def needs_router_logits(entropy: float | None) -> None:
    """Skip where an older Transformers doesn't say a family's router logits, so that none is told (5.14)."""
    if entropy is None and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this Transformers doesn't say the router logits of this family")


def needs_attention(kind: type, implementation: str) -> None:
    """Skip where a family has no attention of that kind yet (T5 and sdpa: Transformers 5.6)."""
    if implementation == "sdpa" and not kind._supports_sdpa:
        pytest.skip(f"this Transformers' {kind.__name__} has no sdpa")


def needs_family(model_type: str) -> None:
    """Skip where Transformers doesn't know a family yet."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {model_type}")


def needs(row: Private) -> None:
    """Skip where the installed version lacks what a row of compat names."""
    if not row.is_present():
        pytest.skip(str(row.missing()))
