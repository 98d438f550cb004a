"""Calibration texts that a conversion isn't fitted on: how well a language model predicts them before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_glu.conversion.fit.calibration import Batches, make_batches
from hf_glu.conversion.fit.fitting import HELD_OUT
from hf_glu.ffn.experts.shares import shifts
from hf_glu.inplace import stock_class
from hf_glu.instruments.perplexity import next_token_perplexity


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Texts of a language model, and its perplexity on them before the conversion."""

    batches: Batches
    before: float

    def finish(self, model: Any) -> dict[str, float]:
        """Return the perplexity before and now, and of how many tokens."""
        after, tokens = next_token_perplexity(model, self.batches)
        return {"before": self.before, "after": after, "tokens": tokens}


def hold_out(model: Any, calibration: Any, tokenizer: Any) -> tuple[HeldOut | None, Any]:
    """Take a share of the texts out of a calibration, one at least, and measure a causal language model on them.

    Returns:
        What was held out, and the rest; None and the whole calibration where it is no text, or the model another.
    """
    if not isinstance(calibration, (list, tuple)) or len(calibration) < 2 or not is_causal(model):
        return None, calibration
    if tokenizer is None or not all(isinstance(text, str) for text in calibration):
        return None, calibration
    count = max(1, int(HELD_OUT * len(calibration)))
    batches = make_batches(model, calibration[-count:], tokenizer)
    before, tokens = next_token_perplexity(model, batches)
    return (HeldOut(batches=batches, before=before) if tokens else None), calibration[:-count]


def is_causal(model: Any) -> bool:
    """Return whether a model is one that predicts each token from those before it."""
    return stock_class(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and shifts(model)
