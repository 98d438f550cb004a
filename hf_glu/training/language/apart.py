"""Whether a model keeps packed documents apart, where their positions begin again."""

from __future__ import annotations

from typing import Any

import torch

from hf_glu.config.traits import vocabulary
from hf_glu.errors import OptionError
from hf_glu.instruments.probe import evaluating

TOKENS = 6  # of each of two documents
SAME = 1e-4  # of the largest logit
# where a cache is made, as by default, Transformers doesn't look for packed documents
PACKED = {"use_cache": False}


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
            packed = model(input_ids=ids.reshape(1, -1), position_ids=places[None], **PACKED).logits
        except TypeError:
            packed = None
        alone = model(input_ids=ids).logits.reshape(1, 2 * TOKENS, -1)
    if packed is None or not torch.allclose(packed, alone, rtol=0.0, atol=SAME * float(alone.abs().max())):
        raise OptionError(
            f"{model.config.model_type} doesn't keep packed documents apart: leave documents=separate out, or give "
            "documents of one block each"
        )
