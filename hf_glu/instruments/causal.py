"""Whether a language model predicts next tokens: that no logits see later ones, and which labels its loss wants.

Both are tried, not listed: what Transformers calls a causal model may see the whole text (BERT that isn't set to be a
decoder, XLNet), or have a loss that compares each token with the label of its own place (BART's decoder).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_glu.errors import OptionError
from hf_glu.instruments.probe import IDS, probe_inputs, try_run

TOKENS = 8  # as many as the shortest block has
SAME, CLOSE = 1e-5, 1e-3  # of the largest logit: what isn't seen, and how near a loss is to what it is computed of
IGNORED = -100


def sees_later(model: Any) -> bool:
    """Return whether a model's logits of a text change with the tokens after them.

    Raises:
        OptionError: it doesn't run on token ids.
    """
    first, other = (_ids(model, seed) for seed in (0, 1))
    half = first.shape[1] // 2
    changed = torch.cat([first[:, :half], other[:, half:]], dim=1)
    before, after = (_run(model, ids)["logits"][:, :half] for ids in (first, changed))
    dtype = next(model.parameters()).dtype
    same = max(SAME, 4 * torch.finfo(dtype).eps)  # experts are computed in groups of other sizes, so rounded otherwise
    return not torch.allclose(before, after, rtol=0.0, atol=same * float(before.abs().max()), equal_nan=True)


def check_causal(model: Any) -> bool:
    """Check that a model predicts each token from those before it.

    Returns:
        Whether its loss itself compares logits with the label of the next token; False: it compares them with that
        of their own place, and is to be given `next_labels`.

    Raises:
        OptionError: it sees later tokens, has a loss of another kind, or doesn't run on token ids.
    """
    name = type(model).__name__
    if sees_later(model):
        decoder = getattr(model.config, "is_decoder", None) is False
        way = "set is_decoder in its config, or take" if decoder else "take"
        raise OptionError(
            f"{name} sees the tokens that it would have to predict, since later ones change its logits: {way} another "
            "objective, or a decoder such as GPT-2"
        )
    ids = _ids(model, 0)
    place = ids.shape[1] // 2
    losses = []
    for token in (0, 1):
        labels = torch.full_like(ids, IGNORED)
        labels[0, place] = token
        losses.append(float(_run(model, ids, labels=labels)["loss"]))
    logits = _run(model, ids)["logits"][0].double()
    # of one label the difference between two tokens is that of their logits, whatever else the loss has
    apart, size = losses[0] - losses[1], CLOSE * float(logits.abs().max())
    for shifted in (True, False):
        at = logits[place - shifted]
        if abs(float(at[1] - at[0]) - apart) <= size:
            return shifted
    raise OptionError(f"the loss of {name} isn't the cross-entropy of next tokens: take a decoder such as GPT-2")


def _ids(model: Any, seed: int) -> Tensor:
    """Return random token ids ``[1, TOKENS]``, or as many as the model reads, without the token that ends a text."""
    inputs = probe_inputs(model, seed=seed, length=TOKENS + 1)
    return next(inputs[name] for name in IDS if name in inputs)[:, :-1]


def _run(model: Any, ids: Tensor, **more: Tensor) -> dict[str, Tensor]:
    return try_run(model, {"input_ids": ids, **more}, instead="")


def next_labels(labels: Tensor) -> Tensor:
    """Return labels ``[B, T]`` in the places before theirs, for a loss that compares each place with its own label."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
