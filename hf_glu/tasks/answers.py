"""From a model's outputs to a task's answers, metrics and score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from hf_glu.errors import DataError
from hf_glu.tasks.inputs import unique_entities
from hf_glu.tasks.metrics import compute
from hf_glu.tasks.metrics.scores import NO_ANSWER
from hf_glu.tasks.table import Task

if TYPE_CHECKING:
    from datasets import Dataset

# a class's number, a score, an entity, several classes, or a tag for each word
Answer: TypeAlias = int | float | str | list[int]


def from_logits(task: Task, data: Dataset, logits: np.ndarray, owners: Sequence[int]) -> Sequence[Answer]:
    """Return each row's answer from a classifier's logits: a class, several (logits above 0), a score, or an entity.

    Args:
        task: the task.
        data: the rows.
        logits: ``[candidates, labels]``.
        owners: the row of each candidate, ascending.

    Raises:
        DataError: a logit is NaN.
    """
    _check_finite(task, logits)
    if task.form == "regression":
        return [float(value) for value in logits[:, 0]]
    if task.form == "classes":
        return [int(value) for value in logits.argmax(-1)]
    if task.form == "multi":
        return [np.flatnonzero(row > 0).tolist() for row in logits]
    scores = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
    bounds = np.searchsorted(np.asarray(owners), np.arange(len(data) + 1))
    best = [int(scores[begin:end].argmax()) for begin, end in pairwise(bounds)]
    if task.form == "choice":
        return best
    return [unique_entities(row)[number] for row, number in zip(data, best, strict=True)]


def from_tokens(task: Task, logits: np.ndarray, places: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the class of each word of each row, from a classifier's logits for the tokens of all rows.

    Args:
        task: the task.
        logits: ``[tokens, labels]``, the rows one after the other.
        places: for each row the place in them of each word's first token; `NO_ANSWER` for a word that has none.

    Raises:
        DataError: a logit is NaN.
    """
    _check_finite(task, logits)
    best = logits.argmax(-1)
    return [[NO_ANSWER if place == NO_ANSWER else int(best[place]) for place in row] for row in places]


def _check_finite(task: Task, logits: np.ndarray) -> None:
    if np.isnan(logits).any():
        raise DataError(f"{task.name}: the model's predictions are NaN")


def from_texts(task: Task, texts: Sequence[str]) -> Sequence[Answer]:
    """Read the answers that a text-to-text model wrote; a text that is no class is -1, one that is no score 0.0."""
    if task.form in ("entity", "text"):
        return [text.strip() for text in texts]
    if task.form == "regression":
        return [_number(text) for text in texts]
    exact = {text: number for number, text in enumerate(task.texts)}
    lower = Counter(text.lower() for text in task.texts)
    loose = {text.lower(): number for text, number in exact.items() if lower[text.lower()] == 1}
    return [exact.get(text.strip(), loose.get(text.strip().lower(), NO_ANSWER)) for text in texts]


def _number(text: str) -> float:
    try:
        value = float(text.strip())
    except ValueError:
        return 0.0
    return value if np.isfinite(value) else 0.0


def metrics(task: Task, data: Dataset, answers: Sequence[Answer]) -> dict[str, float]:
    """Compute a task's metrics of ``answers`` to the rows of ``data``."""
    predictions: Sequence[object] = answers
    references: Sequence[object]
    if task.metric == "multirc":
        predictions = [{"idx": dict(idx), "prediction": each} for idx, each in zip(data["idx"], answers, strict=True)]
        references = list(data["label"])
    elif task.metric == "record":
        predictions = [
            {"idx": dict(idx), "prediction_text": each} for idx, each in zip(data["idx"], answers, strict=True)
        ]
        references = [
            {"idx": dict(idx), "answers": list(gold)} for idx, gold in zip(data["idx"], data["answers"], strict=True)
        ]
    elif task.form == "tokens":
        predictions, references = _named(task, answers), _named(task, data["label"])
    else:
        references = list(data["label"])
    found: dict[str, float] = {}
    for name in task.metric.split(","):
        found |= compute(name, predictions, references)
    return found


def _named(task: Task, rows: Iterable[Any]) -> list[list[str]]:
    """Return the names of words' tags, an empty one for `NO_ANSWER`."""
    return [["" if number == NO_ANSWER else task.labels[number] for number in row] for row in rows]


def score(task: Task, found: dict[str, float]) -> float:
    """Return the mean of the task's main metrics; those of several validation splits are averaged first."""
    values = []
    for name in task.main:
        values.append(fmean(value for key, value in found.items() if key == name or key.endswith(f"/{name}")))
    return fmean(values)
