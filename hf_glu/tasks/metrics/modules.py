"""The metric sets of GLUE and SuperGLUE, and the table of all metrics."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from reprlib import repr as shortened
from typing import ClassVar

import datasets
import evaluate

from hf_glu.errors import DataError
from hf_glu.tasks.metrics import scores
from hf_glu.tasks.metrics.lists import Entities, MultiLabel, Tags
from hf_glu.tasks.metrics.offline import INTEGER, NUMBER, TEXT, ColumnTypes, Given, OfflineMetric
from hf_glu.tasks.metrics.texts import Bleu, ChrF, ExactMatch, Rouge


class Accuracy(OfflineMetric):
    """Accuracy of classes: ``{"accuracy"}``."""

    def _compute(self, predictions: Given, references: Given) -> dict[str, float]:
        return {"accuracy": scores.accuracy(predictions, references)}


class AccuracyF1(OfflineMetric):
    """Accuracy, and F1 of class 1 against class 0: ``{"accuracy", "f1"}`` (MRPC, QQP)."""

    classes = 2

    def _compute(self, predictions: Given, references: Given) -> dict[str, float]:
        return {"accuracy": scores.accuracy(predictions, references), "f1": scores.f1(predictions, references)}


class AccuracyMacroF1(OfflineMetric):
    """Accuracy, and the mean of the classes' F1: ``{"accuracy", "macro_f1"}`` (CB)."""

    def _compute(self, predictions: Given, references: Given) -> dict[str, float]:
        return {
            "accuracy": scores.accuracy(predictions, references),
            "macro_f1": scores.macro_f1(predictions, references),
        }


class Matthews(OfflineMetric):
    """Matthews' correlation of classes: ``{"matthews_correlation"}`` (CoLA, the diagnostic sets)."""

    def _compute(self, predictions: Given, references: Given) -> dict[str, float]:
        return {"matthews_correlation": scores.matthews(predictions, references)}


class PearsonSpearman(OfflineMetric):
    """Correlations of scores: ``{"pearson", "spearmanr"}`` (STS-B)."""

    columns: ClassVar[ColumnTypes] = {"predictions": NUMBER, "references": NUMBER}

    def _checked(self, predictions: Given, references: Given) -> tuple[Given, Given]:
        return scores.as_numbers(predictions, references)

    def _compute(self, predictions: Given, references: Given) -> dict[str, float]:
        return {
            "pearson": scores.pearson(predictions, references),
            "spearmanr": scores.spearman(predictions, references),
        }


class MultiRC(OfflineMetric):
    """F1 over all answers, and the share of questions wholly right: ``{"f1a", "exact_match"}``.

    predictions: ``{"idx": {"paragraph": int, "question": int, "answer": int}, "prediction": 0 or 1}``.
    references: 0 or 1, parallel.
    """

    keys: ClassVar[tuple[str, ...]] = ("paragraph", "question", "answer")
    columns: ClassVar[ColumnTypes] = {
        "predictions": {"idx": dict.fromkeys(keys, INTEGER), "prediction": INTEGER},
        "references": INTEGER,
    }
    classes = 2

    def _checked(self, predictions: Given, references: Given) -> tuple[Given, Given]:
        scores.check_lengths(predictions, references)
        places, labels = _read("predictions", predictions, self.keys, "prediction")
        predicted, expected = super()._checked(labels, references)
        return _rows(places, self.keys, "prediction", predicted.tolist()), expected

    def _compute(self, predictions: Given, references: Given) -> dict[str, float]:
        places, labels = _read("predictions", predictions, self.keys, "prediction")
        _check_unique("predictions", places, self.keys)
        questions = [place[:2] for place in places]
        return {
            "f1a": scores.f1(labels, references),
            "exact_match": scores.question_exact_match(labels, references, questions),
        }


class ReCoRD(OfflineMetric):
    """Token F1 and exact match of texts, the best with any gold answer, mean over queries: ``{"f1", "exact_match"}``.

    predictions: ``{"idx": {"passage": int, "query": int}, "prediction_text": str}``, "" for no answer.
    references: ``{"idx": {...}, "answers": [str, ...]}`` of the same queries, whose order may differ.
    """

    keys: ClassVar[tuple[str, ...]] = ("passage", "query")
    columns: ClassVar[ColumnTypes] = {
        "predictions": {"idx": dict.fromkeys(keys, INTEGER), "prediction_text": TEXT},
        "references": {"idx": dict.fromkeys(keys, INTEGER), "answers": datasets.Sequence(TEXT)},
    }

    def _checked(self, predictions: Given, references: Given) -> tuple[Given, Given]:
        scores.check_lengths(predictions, references)
        places, texts = _read("predictions", predictions, self.keys, "prediction_text")
        queries, golds = _read("references", references, self.keys, "answers")
        scores.check_texts(texts, golds)
        return (
            _rows(places, self.keys, "prediction_text", texts),
            _rows(queries, self.keys, "answers", [list(answers) for answers in golds]),
        )

    def _compute(self, predictions: Given, references: Given) -> dict[str, float]:
        places, texts = _read("predictions", predictions, self.keys, "prediction_text")
        queries, golds = _read("references", references, self.keys, "answers")
        _check_unique("predictions", places, self.keys)
        _check_unique("references", queries, self.keys)
        answered = dict(zip(places, texts, strict=True))
        if missing := [query for query in queries if query not in answered]:
            raise DataError(f"no prediction has the idx {dict(zip(self.keys, missing[0], strict=True))} of a reference")
        ordered = [answered[query] for query in queries]
        return {"f1": scores.record_f1(ordered, golds), "exact_match": scores.record_exact_match(ordered, golds)}


METRICS: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "accuracy_f1": AccuracyF1,
    "matthews": Matthews,
    "pearson_spearman": PearsonSpearman,
    "accuracy_macro_f1": AccuracyMacroF1,
    "multirc": MultiRC,
    "record": ReCoRD,
    "multilabel": MultiLabel,
    "tags": Tags,
    "entities": Entities,
    "exact_match": ExactMatch,
    "rouge": Rouge,
    "chrf": ChrF,
    "bleu": Bleu,
}


def _read(name: str, rows: Given, keys: Sequence[str], field: str) -> tuple[list[tuple[int, ...]], Given]:
    """Return each row's idx, as the integers at ``keys``, and its ``field``."""
    places, values = [], []
    for number, row in enumerate(rows):
        try:
            places.append(tuple(index(row["idx"][key]) for key in keys))
            values.append(row[field])
        except (KeyError, TypeError, IndexError):
            wanted = f"{{'idx': {{{', '.join(f'{key!r}: int' for key in keys)}}}, {field!r}: ...}}"
            raise DataError(f"{name}[{number}] is {shortened(row)}: {wanted} is wanted") from None
    return places, values


def _rows(
    places: list[tuple[int, ...]], keys: Sequence[str], field: str, values: list[object]
) -> list[dict[str, object]]:
    return [
        {"idx": dict(zip(keys, place, strict=True)), field: value} for place, value in zip(places, values, strict=True)
    ]


def _check_unique(name: str, places: list[tuple[int, ...]], keys: Sequence[str]) -> None:
    seen: set[tuple[int, ...]] = set()
    for number, place in enumerate(places):
        if place in seen:
            raise DataError(f"{name}[{number}] has the idx {dict(zip(keys, place, strict=True))} of one before it")
        seen.add(place)
