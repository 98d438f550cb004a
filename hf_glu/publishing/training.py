"""Saying what a run has trained on: a task, or text and the objective that it was trained by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# what an objective predicts, in words
OBJECTIVES = {
    "clm": "next-token prediction",
    "mlm": "masked-token prediction",
    "span": "span corruption",
    "hidden": "hidden states",
}
NAMED = 2  # texts that are named


def is_language(options: Mapping[str, Any]) -> bool:
    """Return whether a run's options are those of language modelling."""
    return "objective" in options


def material(task: object, options: Mapping[str, Any]) -> str:
    """Return the name of what a run has trained on: its task, or its texts."""
    return texts(options.get("data")) if is_language(options) else str(task)


def texts(names: object) -> str:
    """Return the names of texts, of many the first ones: ``a.txt, b.txt and 3 more``."""
    known = [str(name) for name in names] if isinstance(names, list) else []
    more = f" and {len(known) - NAMED} more" if len(known) > NAMED else ""
    return ", ".join(known[:NAMED]) + more or "text"


def trained_on(task: object, options: Mapping[str, Any], *, new: bool) -> str:
    """Return what was done to a model: ``fine-tuned on rte``, ``trained on a.txt by next-token prediction``.

    Args:
        task, options: of the run.
        new: whether the model is a new one.
    """
    if not is_language(options):
        return f"fine-tuned on {task}"
    how = OBJECTIVES.get(str(task), str(task))
    return f"trained {'from scratch ' if new else ''}on {material(task, options)} by {how}"
