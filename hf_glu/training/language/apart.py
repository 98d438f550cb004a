"""Keeping packed documents apart, where their positions begin again: how a model is called, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_glu.config.traits import vocabulary
from hf_glu.errors import OptionError
from hf_glu.instruments.probe import evaluating
from hf_glu.training.language.blocks import IDS, MASK, POSITIONS

TOKENS = 6  # of each of two documents
SAME = 1e-4  # of the largest logit
# where a cache is made, as by default, Transformers doesn't look for packed documents
PACKED = {"use_cache": False}


def apart(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model is given of a batch, so that documents that are packed in it don't see each other.

    Positions that begin again say by themselves which tokens belong together, and Transformers reads them only where
    there is no mask: what follows a text's end is padding that no token before it sees.
    """
    if POSITIONS not in batch:
        return dict(batch)
    return {key: value for key, value in batch.items() if key != MASK} | PACKED


def check_apart(model: Any) -> None:
    """Raise OptionError if a model's logits of a document are others behind another one than alone.

    Transformers finds packed documents by positions that begin again; which families do so is tried, not listed.
    """
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    ids = torch.randint(0, vocabulary(model.config) or 256, (2, TOKENS), generator=generator).to(device)
    places = torch.arange(TOKENS, device=device).repeat(2)
    with evaluating(model):
        try:
            packed = model(**apart({IDS: ids.reshape(1, -1), POSITIONS: places[None]})).logits
        except (TypeError, ValueError, RuntimeError):  # it takes no positions, or not these
            packed = None
        alone = model(input_ids=ids).logits.reshape(1, 2 * TOKENS, -1)
    if packed is None or not torch.allclose(packed, alone, rtol=0.0, atol=SAME * float(alone.abs().max())):
        raise OptionError(
            f"{model.config.model_type} doesn't keep packed documents apart: leave documents=separate out, or give "
            "documents of one block each"
        )
