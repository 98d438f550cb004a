"""Predicting and evaluating a split, on one process or several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator

from hf_glu.config.showing import progress_bar
from hf_glu.ffn.modes import keeping_modes
from hf_glu.tasks import answers
from hf_glu.tasks.answers import NO_ANSWER, Answer
from hf_glu.training.data.features import Batch, Features, collate
from hf_glu.training.data.pairs import collate_prompts
from hf_glu.training.data.tokens import LEFT
from hf_glu.training.loop.accelerating import merge

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# logits ``[inputs, labels]`` (of tokens ``[tokens, labels]``, the inputs one after the other), or the texts that a
# text-to-text model wrote
Predictions: TypeAlias = np.ndarray | list[str]
# what generating takes of a checkpoint's own config
KEPT = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "use_cache",
)  # fmt: skip


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put the model in eval mode and gradients off inside of the block; each part's mode is restored."""
    with keeping_modes(model, training=False), torch.no_grad():
        yield


def predict(
    model: PreTrainedModel,
    features: Features,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
    title: str = "predict",
) -> Predictions:
    """Return the logits ``[inputs, labels]`` or ``[tokens, labels]`` in float32, or the texts that a model writes.

    Every process takes every n-th batch, and all get all of the results; no example counts twice.
    """
    lengths = [len(ids) for ids in features.data["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(model.parameters()).device
    found: dict[int, np.ndarray | str] = {}
    with eval_mode(model):
        for turn in progress_bar(range(math.ceil(len(batches) / processes)), desc=title, leave=False, disable=rank > 0):
            # a process that has run out does the last batch again: wrapped models compute together or not at all
            rows = batches[min(turn * processes + rank, len(batches) - 1)]
            if features.joined:
                batch = collate_prompts(features.data[rows], tokenizer, device)
            else:
                batch = collate(features, tokenizer, rows, device)
                batch.pop("labels", None)
            outputs = _outputs(model, features, tokenizer, batch, accelerator)
            if features.task.form == "tokens":
                outputs = [
                    _unpadded(each, lengths[row], features.side) for row, each in zip(rows, outputs, strict=True)
                ]
            found |= dict(zip(rows, outputs, strict=True))
    if accelerator:
        found = merge(accelerator, found)
    ordered: list[Any] = [found[row] for row in range(len(order))]
    if features.text:
        return ordered
    return np.concatenate(ordered) if features.task.form == "tokens" else np.stack(ordered)


def _unpadded(logits: Any, length: int, side: str) -> np.ndarray:
    """Return the logits of an input's own tokens ``[length, labels]``."""
    return np.asarray(logits[-length:] if side == LEFT else logits[:length])


@contextmanager
def greedily(model: PreTrainedModel) -> Iterator[None]:
    """Let a model write the likeliest token each time within the block, whatever its own generation config says.

    What was meant for long summaries (no repeated words, a least length) makes other texts than those trained on.
    """
    from transformers import GenerationConfig

    known = model.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(known, name, None) for name in KEPT})
    try:
        yield
    finally:
        model.generation_config = known


def _outputs(
    model: PreTrainedModel,
    features: Features,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    accelerator: Accelerator | None,
) -> list[np.ndarray] | list[str]:
    if not features.text:
        return list(model(**batch).logits.float().cpu().numpy())
    plain = accelerator.unwrap_model(model) if accelerator else model
    with greedily(plain):
        written = plain.generate(**batch, max_new_tokens=features.new_tokens, do_sample=False, num_beams=1)
    if features.joined:
        written = written[:, batch["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(written, skip_special_tokens=True))


def answer(features: Features, predictions: Predictions) -> Sequence[Answer]:
    """Return the answer to each row of the split, from predictions for its inputs."""
    if features.text:
        return answers.from_texts(features.task, list(predictions))
    if features.places is not None:
        begins = accumulate((len(ids) for ids in features.data["input_ids"]), initial=0)
        rows = zip(begins, features.places, strict=False)  # the last begin is the end
        places = [[NO_ANSWER if place == NO_ANSWER else begin + place for place in row] for begin, row in rows]
        return answers.from_tokens(features.task, np.asarray(predictions), places)
    return answers.from_logits(features.task, features.raw, np.asarray(predictions), features.owners)


def evaluate(
    model: PreTrainedModel,
    splits: dict[str, Features],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
    title: str = "evaluate",
) -> tuple[dict[str, float], float]:
    """Compute a model's metrics on the validation splits (``split/metric`` if there are several), and its score.

    The score is the mean of the tasks' scores, where the splits are of several tasks.

    Raises:
        DataError: predictions that are NaN, or references that can't be scored.
    """
    found: dict[str, float] = {}
    by_task: dict[str, dict[str, float]] = {}
    for split, features in splits.items():
        given = predict(model, features, tokenizer, batch_size=batch_size, accelerator=accelerator, title=title)
        values = answers.metrics(features.task, features.raw, answer(features, given))
        named = {f"{split}/{key}" if len(splits) > 1 else key: value for key, value in values.items()}
        found |= named
        by_task.setdefault(features.task.name, {}).update(named)
    tasks = {features.task.name: features.task for features in splits.values()}
    return found, fmean(answers.score(tasks[name], values) for name, values in by_task.items())
