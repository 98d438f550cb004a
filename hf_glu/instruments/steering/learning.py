"""Learning thresholds (and slopes) by gradient: what makes the positive texts likely, its opposite the negative ones.

    loss = NLL(positive | strength 1) + NLL(negative | strength -1)

by Adam from the difference of means on, each channel's threshold in units of its deviation. The model's weights stay.

Shapes: B texts of T tokens, W channels.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_glu.errors import OptionError, TrainingError
from hf_glu.ffn.modes import keeping_modes
from hf_glu.instruments.probe import same_randomness
from hf_glu.instruments.steering.contrast import Contrast, batches
from hf_glu.instruments.steering.modulating import GateSteering

RATE, MASKED = 0.05, 0.15
IGNORED = -100


def learn(
    model: nn.Module, tokenizer: Any, contrast: Contrast, start: GateSteering, scales: Mapping[str, Tensor], *,
    steps: int, batch_size: int, seed: int,
) -> GateSteering:  # fmt: skip
    """Return ``start``, learned on.

    Args:
        model: a causal or masked language model.
        tokenizer: its tokenizer.
        contrast: the texts.
        start: where it begins.
        scales: the deviation of each gate's channels, ``[W]``.
        steps: of Adam, each on a batch of as many positive as negative texts.
        batch_size: of both together.
        seed: of the batches, and of masks.

    Raises:
        OptionError: the model is no such language model.
        TrainingError: the loss isn't finite any more.
    """
    masks = _check(model, tokenizer)
    device = next(model.parameters()).device
    moves = {name: torch.zeros_like(value, device=device, requires_grad=True) for name, value in scales.items()}
    turns = {name: value.to(device).clone().requires_grad_() for name, value in start.log_slopes.items()}
    adam = torch.optim.Adam([*moves.values(), *turns.values()], lr=RATE)
    draw = random.Random(seed)
    with _frozen(model), same_randomness(model, seed=seed):
        for _ in range(steps):
            numbers = _drawn(contrast, max(1, batch_size // 2), draw)
            drawn = {at: contrast.texts[number] for at, number in enumerate(numbers)}
            order, inputs = next(batches(model, drawn, len(drawn)))
            signs = torch.tensor([1.0 - 2 * contrast.sign(numbers[at]) for at in order])
            now = replace(start, thresholds=_moved(start, moves, scales), log_slopes=turns)
            with torch.enable_grad(), now.on(model, signs, check=False):
                loss = _loss(model, inputs, masks)
                if not loss.isfinite():
                    raise TrainingError(f"the loss of method='learned' is {float(loss)}: fewer steps, or diffmean")
                adam.zero_grad()
                loss.backward()
            adam.step()
    thresholds = {name: value.detach().cpu() for name, value in _moved(start, moves, scales).items()}
    return replace(start, thresholds=thresholds, log_slopes={name: turn.detach().cpu() for name, turn in turns.items()})


def _check(model: nn.Module, tokenizer: Any) -> int | None:
    """Return the token that masks are, None for a causal model."""
    kind, config = type(model).__name__, getattr(model, "config", None)
    masked = kind.endswith("ForMaskedLM") and tokenizer.mask_token_id is not None
    head: Any = getattr(model, "get_output_embeddings", None)
    causal = not masked and head is not None and head() is not None
    if getattr(config, "is_encoder_decoder", False) or not (masked or (causal and not kind.endswith("MaskedLM"))):
        raise OptionError(
            f"method='learned' needs a causal or masked language model with its head, not {kind}: diffmean, pca and "
            "probe work without"
        )
    return int(tokenizer.mask_token_id) if masked else None


def _moved(start: GateSteering, moves: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: start.thresholds[name].to(move.device) + scales[name].to(move.device) * move
        for name, move in moves.items()
    }


def _drawn(contrast: Contrast, each: int, draw: random.Random) -> list[int]:
    """Return the numbers of ``each`` positive and as many negative texts."""
    sides: Sequence[range] = (range(contrast.positive), range(contrast.positive, len(contrast.texts)))
    return [at for side in sides for at in draw.sample(side, min(each, len(side)))]


def _loss(model: Any, inputs: Mapping[str, Tensor], mask: int | None) -> Tensor:
    """Return the mean negative log-likelihood of a batch's tokens, each text counting alike."""
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    given = dict(inputs)
    labels = ids.masked_fill(~valid, IGNORED)
    if mask is not None:
        hidden = (torch.rand(ids.shape, device=ids.device) < MASKED) & valid
        hidden[:, 0] |= ~hidden.any(1)
        given["input_ids"], labels = ids.masked_fill(hidden, mask), ids.masked_fill(~hidden, IGNORED)
    logits = model(**given).logits
    if mask is None:
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").sum(
        1
    )
    return (each / (labels != IGNORED).sum(1).clamp_min(1)).mean()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no weight have a gradient, and no dropout drop, within the block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        with keeping_modes(model, training=False):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()
