"""Metrics of written texts against one reference each, by the packages that others compute them with."""

from __future__ import annotations

from reprlib import repr as shortened
from statistics import fmean
from typing import ClassVar

from hf_glu.config.extras import need
from hf_glu.errors import DataError
from hf_glu.tasks.metrics import scores
from hf_glu.tasks.metrics.offline import TEXT, ColumnTypes, Given, OfflineMetric


class ExactMatch(OfflineMetric):
    """The share of texts that are their reference, but for spaces around them: ``{"exact_match"}``.

    predictions, references: a text for each row.
    """

    columns: ClassVar[ColumnTypes] = {"predictions": TEXT, "references": TEXT}

    def _checked(self, predictions: Given, references: Given) -> tuple[Given, Given]:
        scores.check_lengths(predictions, references)
        for name, texts in (("predictions", predictions), ("references", references)):
            if wrong := [number for number, text in enumerate(texts) if not isinstance(text, str)]:
                raise DataError(f"{name}[{wrong[0]}] is {shortened(texts[wrong[0]])}: a string is wanted")
        return predictions, references

    def _compute(self, predictions: Given, references: Given) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        return {"exact_match": fmean(text.strip() == wanted.strip() for text, wanted in pairs)}


class Rouge(ExactMatch):
    """ROUGE-L's F by rouge_score, the mean over rows, of words of Latin letters and digits: ``{"rougeL"}``."""

    def _compute(self, predictions: Given, references: Given) -> dict[str, float]:
        need("rouge_score", what="rouge")
        from rouge_score.rouge_scorer import RougeScorer

        scorer, pairs = RougeScorer(["rougeL"]), zip(predictions, references, strict=True)
        return {"rougeL": fmean(scorer.score(wanted, text)["rougeL"].fmeasure for text, wanted in pairs)}


class ChrF(ExactMatch):
    """ChrF of all rows together by sacrebleu, as a fraction: ``{"chrf"}``."""

    def _compute(self, predictions: Given, references: Given) -> dict[str, float]:
        need("sacrebleu", what="chrf")
        from sacrebleu import corpus_chrf

        return {"chrf": corpus_chrf(list(predictions), [list(references)]).score / 100}


class Bleu(ExactMatch):
    """BLEU of all rows together by sacrebleu, as a fraction, with its own splitting of words: ``{"bleu"}``."""

    def _compute(self, predictions: Given, references: Given) -> dict[str, float]:
        need("sacrebleu", what="bleu")
        from sacrebleu import corpus_bleu

        return {"bleu": corpus_bleu(list(predictions), [list(references)]).score / 100}
