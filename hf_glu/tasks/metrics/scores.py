"""Scores of predictions against references, as GLUE and SuperGLUE define them: pure functions of parallel sequences.

Classes are integers from 0; the prediction -1 (`NO_ANSWER`) is no valid answer, and wrong. Every function checks its
arguments and raises DataError for sequences that are empty or of different lengths, for NaN and infinities, for values
that are no class, and for the negative references of a test split without labels. Results are Python floats.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from reprlib import repr as shortened
from statistics import fmean
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from hf_glu.errors import DataError

# numbers one after the other: a list, an array, a tensor
Values: TypeAlias = ArrayLike
NO_ANSWER = -1
UNLABELLED = "the split is unlabelled, as test splits are, and can't be scored: use the validation split"
# below this spread, relative to the largest value, float64 has no digits left for a correlation (scipy warns there too)
CONSTANT = 1e-13
_LARGEST_CLASS = 2**31 - 1
_REAL = "biuf"  # NumPy's kinds of real numbers
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(predictions: Values, references: Values) -> float:
    """Return the share of predictions that equal their reference."""
    predicted, expected = as_classes(predictions, references)
    return float((predicted == expected).mean())


def f1(predictions: Values, references: Values) -> float:
    """Return F1 = 2 TP / (2 TP + FP + FN) of class 1 against class 0; -1 is not positive; 0/0 is 0."""
    from sklearn.metrics import f1_score

    predicted, expected = as_classes(predictions, references, count=2)
    return float(f1_score(expected == 1, predicted == 1, zero_division=0))


def macro_f1(predictions: Values, references: Values) -> float:
    """Return the mean of the classes' F1 over those that occur in references or predictions, -1 not among them."""
    from sklearn.metrics import f1_score

    predicted, expected = as_classes(predictions, references)
    classes = np.setdiff1d(np.union1d(predicted, expected), [NO_ANSWER])
    return float(f1_score(expected, predicted, labels=classes, average="macro", zero_division=0))


def matthews(predictions: Values, references: Values) -> float:
    """Return Matthews' correlation, for more than two classes R_K (Gorodkin 2004); 0/0 is 0.

    (c s - t.p) / sqrt((s^2 - p.p) (s^2 - t.t)), with s examples, c of them right, and t_k, p_k the numbers of
    references and predictions of class k. -1 is a class of its own, which no reference has.
    """
    from sklearn.metrics import matthews_corrcoef

    predicted, expected = as_classes(predictions, references)
    if np.union1d(predicted, expected).size == 1:  # 0/0, where sklearn warns besides
        return 0.0
    return float(matthews_corrcoef(expected, predicted))


def pearson(predictions: Values, references: Values) -> float:
    """Return Pearson's r; 0.0 where the predictions are constant.

    A constant prediction orders nothing, and the NaN that other tools return can't be averaged over tasks.

    Raises:
        DataError: the references are constant, so that no prediction could score.
    """
    return _correlation(predictions, references, _scaled)


def spearman(predictions: Values, references: Values) -> float:
    """Return Spearman's rho, Pearson's r of the ranks, where ties share their mean rank; else as `pearson`."""
    return _correlation(predictions, references, _ranks)


def question_exact_match(predictions: Values, references: Values, questions: Sequence[Hashable]) -> float:
    """Return the share of questions all of whose answers (0 or 1 each) are right: MultiRC's exact match.

    Args:
        predictions, references: one for each answer.
        questions: the question of each answer, in any order.
    """
    predicted, expected = as_classes(predictions, references, count=2)
    check_lengths(questions, expected, name="questions")
    right = dict.fromkeys(questions, True)
    for question, hit in zip(questions, predicted == expected, strict=True):
        right[question] &= bool(hit)
    return fmean(right.values())


def record_f1(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> float:
    """Return the mean over queries of the largest `token_f1` with any of the query's gold answers."""
    return _best(token_f1, predictions, golds)


def record_exact_match(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> float:
    """Return the share of queries whose prediction is one of the gold answers, both normalised."""
    return _best(lambda text, gold: normalize_answer(text) == normalize_answer(gold), predictions, golds)


def normalize_answer(text: str) -> str:
    """Return the text in lower case without ASCII punctuation, the articles a, an, the, and extra spaces (SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def token_f1(text: str, gold: str) -> float:
    """Return 2 |common words| / (|words of text| + |words of gold|) of the normalised texts; 0 where none is common.

    As in ReCoRD's script, two texts that are both empty once normalised have F1 0 but match exactly.
    """
    words, wanted = normalize_answer(text).split(), normalize_answer(gold).split()
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def as_classes(predictions: Values, references: Values, *, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions and references as int64 ``[N]``; floats must be whole numbers.

    Args:
        predictions, references: ``[N]``, N > 0.
        count: number of classes; None: any.

    Raises:
        DataError: a value that is no class; the message has its position.
    """
    predicted, expected = _parallel(predictions, references, "a class index is wanted, such as logits.argmax(-1)")
    last = _LARGEST_CLASS if count is None else count - 1
    for name, array in (("predictions", predicted), ("references", expected)):
        _require(name, array, array == np.floor(array), "a class index is wanted, such as logits.argmax(-1)")
        _require(name, array, array <= last, f"the largest class is {last}")
    _require("references", expected, expected >= 0, UNLABELLED)
    _require("predictions", predicted, predicted >= NO_ANSWER, f"classes start at 0, and {NO_ANSWER} is no answer")
    return predicted.astype(np.int64), expected.astype(np.int64)


def as_numbers(predictions: Values, references: Values) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions and references as finite float64 ``[N]``, N > 0.

    Raises:
        DataError: a value that is no finite number; the message has its position.
    """
    predicted, expected = _parallel(predictions, references, "a number is wanted, such as logits.squeeze(-1) has")
    return predicted.astype(np.float64), expected.astype(np.float64)


def check_texts(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> None:
    """Raise DataError unless predictions are strings, each with a list of one or more gold strings."""
    check_lengths(predictions, golds)
    for number, (text, answers) in enumerate(zip(predictions, golds, strict=True)):
        if not isinstance(text, str):
            raise DataError(f"predictions[{number}] is {shortened(text)}: a string is wanted, '' for no answer")
        if isinstance(answers, (str, Mapping)) or not isinstance(answers, Collection):
            raise DataError(
                f"the gold answers of references[{number}] are {shortened(answers)}: a list of strings is wanted"
            )
        if len(answers) == 0:
            raise DataError(f"references[{number}] has no gold answer: {UNLABELLED}")
        if wrong := [answer for answer in answers if not isinstance(answer, str)]:
            raise DataError(f"references[{number}] has the gold answer {shortened(wrong[0])}: a string is wanted")


def check_lengths(predictions: object, references: object, *, name: str = "predictions") -> None:
    """Raise DataError unless both are sequences of the same length, which isn't 0."""
    try:
        lengths = len(predictions), len(references)  # type: ignore[arg-type]
    except TypeError as error:
        raise DataError(f"{name} and references must be sequences: {error}") from None
    if lengths[0] != lengths[1]:
        raise DataError(f"there are {lengths[0]} {name} but {lengths[1]} references: one for each is wanted")
    if not lengths[0]:
        raise DataError(f"there are no {name} to compute a metric of")


def _parallel(predictions: Values, references: Values, wanted: str) -> tuple[np.ndarray, np.ndarray]:
    check_lengths(predictions, references)
    return _array("predictions", predictions, wanted), _array("references", references, wanted)


def _array(name: str, values: Values, wanted: str) -> np.ndarray:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists; tensors that need a gradient, or of a GPU
        raise DataError(f"{name} can't be read as numbers: {str(error).splitlines()[0]}") from error
    if array.ndim != 1:
        raise DataError(f"{name} have the shape {array.shape}: one value for each example is wanted; {wanted}")
    if array.dtype.kind not in _REAL:
        listed = list(values)  # type: ignore[arg-type]
        first = next((number for number, value in enumerate(listed) if np.asarray(value).dtype.kind not in _REAL), 0)
        raise DataError(f"{name}[{first}] is {shortened(listed[first])}: {wanted}")
    array = array.astype(np.int64) if array.dtype.kind == "b" else array
    _require(name, array, np.isfinite(array), "it must be finite")
    return array


def _require(name: str, array: np.ndarray, valid: np.ndarray, why: str) -> None:
    if not valid.all():
        first = int(valid.argmin())
        raise DataError(f"{name}[{first}] is {array[first]}: {why}")


def _correlation(predictions: Values, references: Values, of: Callable[[np.ndarray], np.ndarray]) -> float:
    predicted, expected = as_numbers(predictions, references)
    if _is_constant(expected):
        why = UNLABELLED if (expected == -1).all() else "a correlation needs at least two different ones"
        raise DataError(f"all references are {expected[0]}: {why}")
    if _is_constant(predicted):
        return 0.0
    return float(np.corrcoef(of(predicted), of(expected))[0, 1])


def _is_constant(x: np.ndarray) -> bool:
    return bool(np.ptp(_scaled(x)) <= CONSTANT)


def _scaled(x: np.ndarray) -> np.ndarray:
    """Divide by a power of two, which is exact, to below 1: squares neither overflow nor vanish."""
    return np.ldexp(x, -np.frexp(np.abs(x).max())[1])


def _ranks(x: np.ndarray) -> np.ndarray:
    """Return the values' ranks from 1 on; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def _best(score: Callable[[str, str], float], predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> float:
    check_texts(predictions, golds)
    return fmean(max(score(text, gold) for gold in answers) for text, answers in zip(predictions, golds, strict=True))
