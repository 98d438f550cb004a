"""Metrics of lists: several classes for each row, and a tag for each word."""

from __future__ import annotations

from reprlib import repr as shortened
from typing import ClassVar

import datasets

from hf_glu.config.extras import need
from hf_glu.errors import DataError
from hf_glu.tasks.metrics import scores
from hf_glu.tasks.metrics.offline import INTEGER, TEXT, ColumnTypes, Given, OfflineMetric

OUTSIDE = "O"
# the last tag of an entity, and the tag of one of a single word, as BILOU and seqeval spell them
_SPELLED = {"L": "E", "U": "S"}


def check_lists(predictions: Given, references: Given, kind: type, *, parallel: bool) -> None:
    """Raise DataError unless both are lists of lists of ``kind``, parallel inside, too, if ``parallel``."""
    scores.check_lengths(predictions, references)
    for name, rows in (("predictions", predictions), ("references", references)):
        for number, row in enumerate(rows):
            if not isinstance(row, (list, tuple)) or not all(isinstance(each, kind) for each in row):
                raise DataError(f"{name}[{number}] is {shortened(row)}: a list of {kind.__name__} is wanted")
    for number, (row, wanted) in enumerate(zip(predictions, references, strict=True)):
        if parallel and len(row) != len(wanted):
            raise DataError(f"predictions[{number}] has {len(row)} tags, and its reference {len(wanted)}")


class MultiLabel(OfflineMetric):
    """F1 over all decisions, the mean of the classes' F1, and the share of rows wholly right: ``{"micro_f1",
    "macro_f1", "exact_match"}``.

    predictions, references: ``[class, ...]`` for each row, perhaps none. Classes are those that occur in either.
    """

    columns: ClassVar[ColumnTypes] = dict.fromkeys(("predictions", "references"), datasets.Sequence(INTEGER))

    def _checked(self, predictions: Given, references: Given) -> tuple[Given, Given]:
        check_lists(predictions, references, int, parallel=False)
        return predictions, references

    def _compute(self, predictions: Given, references: Given) -> dict[str, float]:
        from sklearn.metrics import f1_score
        from sklearn.preprocessing import MultiLabelBinarizer

        found = sorted({each for row in (*predictions, *references) for each in row})
        same = [set(row) == set(wanted) for row, wanted in zip(predictions, references, strict=True)]
        exact = {"exact_match": sum(same) / len(same)}
        if not found:  # 0/0
            return {"micro_f1": 0.0, "macro_f1": 0.0, **exact}
        binary = MultiLabelBinarizer(classes=found)
        wanted, given = binary.fit_transform(references), binary.transform(predictions)
        return {
            f"{kind}_f1": float(f1_score(wanted, given, average=kind, zero_division=0)) for kind in ("micro", "macro")
        } | exact


class Tags(OfflineMetric):
    """Accuracy of words' tags: ``{"accuracy"}``.

    predictions, references: ``[tag, ...]`` for each row, a text for each word; an empty one is no answer.
    """

    columns: ClassVar[ColumnTypes] = dict.fromkeys(("predictions", "references"), datasets.Sequence(TEXT))

    def _checked(self, predictions: Given, references: Given) -> tuple[Given, Given]:
        check_lists(predictions, references, str, parallel=True)
        if not any(references):
            raise DataError("no reference has a tag")
        return predictions, references

    def _compute(self, predictions: Given, references: Given) -> dict[str, float]:
        pairs = [pair for both in zip(predictions, references, strict=True) for pair in zip(*both, strict=True)]
        return {"accuracy": sum(tag == wanted for tag, wanted in pairs) / len(pairs)}


class Entities(Tags):
    """Precision, recall and F1 of whole entities by seqeval, and accuracy of tags: ``{"precision", "recall", "f1",
    "accuracy"}``.

    Tags are ``O``, ``B-kind``, ``I-kind``, perhaps ``E-``, ``S-`` (or BILOU's ``L-``, ``U-``), read as conlleval does.
    """

    def _compute(self, predictions: Given, references: Given) -> dict[str, float]:
        need("seqeval", what="scoring entities")
        from seqeval.metrics import f1_score, precision_score, recall_score

        given, wanted = ([[_spelled(tag) for tag in row] for row in rows] for rows in (predictions, references))
        counted = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
        found = {name: float(score(wanted, given, zero_division=0)) for name, score in counted.items()}
        return {**found, **super()._compute(given, wanted)}


def _spelled(tag: str) -> str:
    """Return a tag as seqeval reads it; no answer is outside of any entity."""
    kind, dash, name = (tag or OUTSIDE).partition("-")
    return f"{_SPELLED.get(kind, kind)}{dash}{name}"
