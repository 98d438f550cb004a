"""The metrics of GLUE and SuperGLUE: against scikit-learn and scipy, by hand, and what can't be scored."""

import subprocess
import sys
from importlib.util import find_spec

import evaluate
import numpy as np
import pytest
import torch
from comparing import assert_same
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

import hf_glu.tasks.metrics
from hf_glu.errors import DataError, UnknownNameError
from hf_glu.tasks.metrics import METRICS, compute, scores

NAN, INF = float("nan"), float("inf")
NEEDS = {"entities": "seqeval", "rouge": "rouge_score", "chrf": "sacrebleu", "bleu": "sacrebleu"}
SCALAR = ("accuracy", "accuracy_f1", "matthews", "pearson_spearman", "accuracy_macro_f1")
SEEDS = pytest.mark.parametrize("seed", range(5))


def same(actual, expected):
    """Assert equal floats, or dictionaries of floats, within the rounding of float64; all are Python floats."""
    if not isinstance(expected, dict):
        actual, expected = {"": actual}, {"": expected}
    assert actual.keys() == expected.keys()
    assert all(type(value) is float for value in actual.values())
    for key, value in expected.items():
        exact = (torch.tensor(each, dtype=torch.float64) for each in (actual[key], value))
        assert_same(*exact, "formula")


def classes(seed, count=2, size=60):
    generator = np.random.default_rng(seed)
    return generator.integers(0, count, size).tolist(), generator.integers(0, count, size).tolist()


def without_answer(predictions, seed):
    drop = np.random.default_rng(100 + seed).random(len(predictions)) < 0.2
    assert drop.any()
    return np.where(drop, -1, predictions).tolist()


def answer(place, label):
    return {"idx": dict(zip(("paragraph", "question", "answer"), place, strict=True)), "prediction": label}


def text(place, said):
    return {"idx": dict(zip(("passage", "query"), place, strict=True)), "prediction_text": said}


def gold(place, *answers):
    return {"idx": dict(zip(("passage", "query"), place, strict=True)), "answers": list(answers)}


# against scikit-learn and scipy


@SEEDS
@pytest.mark.parametrize("answered", [True, False])
def test_binary_scores_are_sklearns(seed, answered):
    predicted, expected = classes(seed)
    if not answered:
        predicted = without_answer(predicted, seed)
    same(scores.accuracy(predicted, expected), accuracy_score(expected, predicted))
    positive = [label == 1 for label in predicted]
    same(scores.f1(predicted, expected), f1_score([label == 1 for label in expected], positive))
    same(scores.matthews(predicted, expected), matthews_corrcoef(expected, predicted))


@SEEDS
@pytest.mark.parametrize("answered", [True, False])
def test_scores_of_three_classes_are_sklearns(seed, answered):
    predicted, expected = classes(seed, count=3)
    if not answered:
        predicted = without_answer(predicted, seed)
    same(scores.accuracy(predicted, expected), accuracy_score(expected, predicted))
    same(scores.macro_f1(predicted, expected), f1_score(expected, predicted, average="macro", labels=[0, 1, 2]))
    same(scores.matthews(predicted, expected), matthews_corrcoef(expected, predicted))


@SEEDS
@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_scipys(seed, ties):
    generator = np.random.default_rng(seed)
    expected = generator.normal(size=50)
    predicted = expected + generator.normal(size=50)
    if ties:
        predicted, expected = predicted.round(), expected.round()
        assert len(set(predicted)) < 10
    same(scores.pearson(predicted, expected), float(stats.pearsonr(predicted, expected).statistic))
    same(scores.spearman(predicted, expected), float(stats.spearmanr(predicted, expected).statistic))


def test_correlations_are_exact_far_from_1():
    predicted, expected = [1.0, 2.0, 4.0, 3.0], [0.0, 1.0, 2.0, 5.0]
    wanted = float(stats.pearsonr(predicted, expected).statistic)
    for scale in (1e-300, 1e300):  # squares would be 0 or infinite
        same(scores.pearson([scale * value for value in predicted], expected), wanted)
    same(scores.pearson([2.0**30 + value for value in predicted], expected), wanted)


# by hand


def test_classification_by_hand():
    predicted, expected = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    same(scores.accuracy(predicted, expected), 3 / 5)
    same(scores.f1(predicted, expected), 2 / 3)  # TP 2, FP 1, FN 1: 4 / (4 + 1 + 1)
    # TP 2, TN 1, FP 1, FN 1: (2*1 - 1*1) / sqrt(3 * 3 * 2 * 2)
    same(scores.matthews(predicted, expected), 1 / 6)


def test_no_answer_is_wrong():
    predicted, expected = [1, -1, 0, -1], [1, 1, 0, 0]
    same(scores.accuracy(predicted, expected), 2 / 4)
    same(scores.f1(predicted, expected), 2 / 3)  # TP 1, FP 0, FN 1: 2 / (2 + 0 + 1)
    # s = 4, c = 2; of references t = (0 of -1, 2, 2), of predictions p = (2, 1, 1)
    # (2*4 - (2*1 + 2*1)) / sqrt((16 - 6) (16 - 8)) = 4 / sqrt(80)
    same(scores.matthews(predicted, expected), 4 / 80**0.5)
    # class 0: TP 1, FN 1, 2/3; class 1: the same; -1 is not averaged over
    same(scores.macro_f1(predicted, expected), 2 / 3)


def test_no_answer_at_all():
    predicted, expected = [-1, -1], [1, 0]
    for score in (scores.accuracy, scores.f1, scores.matthews, scores.macro_f1):
        same(score(predicted, expected), 0.0)


def test_macro_f1_averages_over_classes_that_occur():
    # class 0: TP 1, FN 1 -> 2/3; class 2, only predicted: 0; class 3: TP 1 -> 1; class 1 doesn't occur
    same(scores.macro_f1([0, 2, 3], [0, 0, 3]), (2 / 3 + 0 + 1) / 3)


@pytest.mark.parametrize(
    ("predicted", "expected", "f1", "matthews"),
    [
        ([1, 1], [1, 1], 1.0, 0.0),
        ([0, 0], [0, 0], 0.0, 0.0),  # no positive anywhere: 0/0
        ([0, 1], [0, 0], 0.0, 0.0),  # FP 1 only
        ([1, 0], [1, 1], 2 / 3, 0.0),
        ([0, 0], [0, 1], 0.0, 0.0),
        ([1], [1], 1.0, 0.0),
        ([1, -1], [1, 1], 2 / 3, 0.0),
    ],
)
def test_one_class_only(predicted, expected, f1, matthews):
    same(scores.f1(predicted, expected), f1)
    same(scores.matthews(predicted, expected), matthews)


def test_correlations_by_hand():
    # deviations (-1, 0, 1) and (-2, 1, 1): 3 / sqrt(2 * 6)
    same(scores.pearson([1, 2, 3], [0, 3, 3]), 3 / 12**0.5)
    # ranks (1, 2, 3) and (1, 2.5, 2.5): deviations (-1, 0, 1), (-1, .5, .5): 1.5 / sqrt(2 * 1.5)
    same(scores.spearman([1, 2, 30], [0, 3, 3]), 1.5 / 3**0.5)
    same(scores.spearman([1, 2, 30], [-5, -4, 100]), 1.0)
    same(scores.pearson([0, 1], [9, 3]), -1.0)


@pytest.mark.parametrize("score", [scores.pearson, scores.spearman])
def test_constant_predictions_correlate_0_and_constant_references_are_an_error(score):
    same(score([0.1, 0.1, 0.1], [1, 2, 3]), 0.0)
    same(score([0, 0, 0], [1, 2, 3]), 0.0)
    last_place = 1e5 + 1e-11
    assert last_place > 1e5
    same(score([1e5, 1e5, last_place], [1, 2, 3]), 0.0)
    # in float32 a unit in the last place counts: deviations (-1, -1, 2) and (-1, 0, 1): 3 / sqrt(6 * 2)
    same(score(np.float32([1e5, 1e5, 1e5 + 0.01]), [1, 2, 3]), 3 / 12**0.5)
    with pytest.raises(DataError, match=r"all references are 3\.0: a correlation needs at least two different"):
        score([1, 2], [3, 3])
    with pytest.raises(DataError, match="all references are 3"):
        score([1], [3])


def test_multirc_by_hand():
    predicted, expected = [1, 0, 1, 1, -1, 0], [1, 0, 0, 1, 1, 0]
    questions = ["a", "a", "b", "b", "c", "a"]
    same(scores.f1(predicted, expected), 2 / 3)  # TP 2, FP 1, FN 1 (the -1): 4 / 6
    same(scores.question_exact_match(predicted, expected, questions), 1 / 3)  # a right, b and c not


def test_normalised_answers():
    assert scores.normalize_answer("  The  U.S. of an   A-team!\n") == "us of ateam"
    assert scores.normalize_answer("theatre an a") == "theatre"
    assert scores.normalize_answer("The?") == ""


@pytest.mark.parametrize(
    ("said", "answers", "f1", "exact"),
    [
        ("the New York!", ["new york"], 1.0, 1.0),
        ("York", ["New York", "Boston"], 2 / 3, 0.0),  # 1 common of 1 and 2 words: 2 * 1 / 3
        ("new york city", ["Boston", "York", "New York"], 4 / 5, 0.0),  # max(0, 2/4, 2*2/5)
        ("york york", ["york"], 2 / 3, 0.0),  # counted once: 2 * 1 / 3
        ("", ["Boston"], 0.0, 0.0),
        ("Boston", ["New York", "BOSTON"], 1.0, 1.0),
        ("a", ["The"], 0.0, 1.0),  # both empty, as ReCoRD's script scores them
    ],
)
def test_record_by_hand(said, answers, f1, exact):
    same(scores.record_f1([said], [answers]), f1)
    same(scores.record_exact_match([said], [answers]), exact)
    same(scores.record_f1([said, "x"], [answers, ["x"]]), (f1 + 1) / 2)


# the `evaluate` metrics


def test_the_table():
    keys = {
        "accuracy": ["accuracy"],
        "accuracy_f1": ["accuracy", "f1"],
        "matthews": ["matthews_correlation"],
        "pearson_spearman": ["pearson", "spearmanr"],
        "accuracy_macro_f1": ["accuracy", "macro_f1"],
        "multirc": ["f1a", "exact_match"],
        "record": ["f1", "exact_match"],
        "multilabel": ["micro_f1", "macro_f1", "exact_match"],
        "tags": ["accuracy"],
        "entities": ["precision", "recall", "f1", "accuracy"],
        "exact_match": ["exact_match"],
        "rouge": ["rougeL"],
        "chrf": ["chrf"],
        "bleu": ["bleu"],
    }
    assert set(METRICS) == set(keys)
    inputs = dict.fromkeys(SCALAR, ([0, 1], [0, 1]))
    inputs["multirc"] = [answer((0, 0, 0), 1)], [1]
    inputs["record"] = [text((0, 0), "x")], [gold((0, 0), "x")]
    inputs["multilabel"] = [[0], [0, 2]], [[0], [2, 0]]
    inputs["tags"] = inputs["entities"] = [["B-X", "O"]], [["B-X", "O"]]
    inputs |= dict.fromkeys(("exact_match", "rouge", "chrf", "bleu"), (["a b c d"], ["a b c d"]))
    for name, metric in METRICS.items():
        assert issubclass(metric, evaluate.Metric)
        assert metric().description == metric.__doc__
        if name in NEEDS and find_spec(NEEDS[name]) is None:
            continue
        same(compute(name, *inputs[name]), dict.fromkeys(keys[name], 1.0))


@SEEDS
def test_the_metrics_are_the_functions(seed):
    predicted, expected = classes(seed)
    predicted = without_answer(predicted, seed)
    wanted = {
        "accuracy": {"accuracy": scores.accuracy},
        "accuracy_f1": {"accuracy": scores.accuracy, "f1": scores.f1},
        "matthews": {"matthews_correlation": scores.matthews},
        "accuracy_macro_f1": {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1},
        "pearson_spearman": {"pearson": scores.pearson, "spearmanr": scores.spearman},
    }
    for name, functions in wanted.items():
        if name == "pearson_spearman":
            predicted, expected = np.random.default_rng(seed).normal(size=(2, 40)).tolist()
        result = METRICS[name]().compute(predictions=predicted, references=expected)
        assert result == {key: function(predicted, expected) for key, function in functions.items()}


@SEEDS
def test_multirc_groups_answers_by_paragraph_and_question(seed):
    predicted, expected = classes(seed, size=40)
    expected[:20] = predicted[:20]
    places = [(number // 12, number // 4 % 3, number) for number in range(40)]
    order = np.random.default_rng(seed).permutation(40)
    result = compute(
        "multirc", [answer(places[n], predicted[n]) for n in order], np.asarray([expected[n] for n in order])
    )
    # four answers a question, ten questions, of which at least the first five are right
    right = sum(predicted[n : n + 4] == expected[n : n + 4] for n in range(0, 40, 4))
    assert right >= 5
    same(result, {"f1a": f1_score(expected, predicted), "exact_match": right / 10})


def test_multirc_without_an_answer():
    predictions = [answer((0, 0, 0), -1), answer((0, 0, 1), 0), answer((0, 1, 2), 1), answer((1, 0, 3), 1)]
    # f1a: TP 2, FN 1 (the -1): 4 / 5; questions: wrong, right, right
    same(compute("multirc", predictions, [1, 0, 1, 1]), {"f1a": 4 / 5, "exact_match": 2 / 3})


def test_record_finds_the_query_of_each_prediction():
    predictions = [text((0, 1), "York"), text((0, 0), "Boston")]
    references = [gold((0, 0), "Boston"), gold((0, 1), "New York", "Jersey")]
    same(compute("record", predictions, references), {"f1": (1 + 2 / 3) / 2, "exact_match": 1 / 2})
    same(compute("record", predictions[::-1], references), {"f1": (1 + 2 / 3) / 2, "exact_match": 1 / 2})


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, torch.tensor, np.float32, np.uint8])
def test_any_sequence_of_integral_numbers(kind):
    predicted, expected = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    same(compute("accuracy_f1", kind(predicted), kind(expected)), {"accuracy": 3 / 5, "f1": 2 / 3})
    same(compute("accuracy", [True, False], [1, 1]), {"accuracy": 1 / 2})


def test_numbers_keep_their_precision():
    # float32 columns would make these constant
    predicted = [1.0, 1.0 + 1e-9, 1.0 + 3e-9]
    same(compute("pearson_spearman", predicted, [1, 2, 3])["pearson"], scores.pearson(predicted, [1, 2, 3]))


def test_batches_add_up_and_instances_are_apart():
    first, second = METRICS["accuracy"](), METRICS["accuracy"]()
    first.add_batch(predictions=[1, 1], references=[1, 0])
    second.add_batch(predictions=[0], references=[0])
    with pytest.raises(DataError, match=r"predictions\[1\] is 0.5"):
        first.add_batch(predictions=[1, 0.5], references=[1, 1])  # adds nothing
    first.add(prediction=0, reference=0)
    with pytest.raises(DataError, match=r"predictions\[0\] is 2: the largest class is 1"):
        METRICS["accuracy_f1"]().add_batch(predictions=[2], references=[1])
    same(first.compute(), {"accuracy": 2 / 3})
    same(second.compute(), {"accuracy": 1.0})
    same(first.compute(predictions=[1, 0], references=[0, 1]), {"accuracy": 0.0})


def test_a_failed_computation_leaves_nothing_behind():
    metric = METRICS["pearson_spearman"]()
    for predictions, references in (([1, 2], [3, 3]), ([1, NAN], [1, 2])):
        with pytest.raises(DataError):
            metric.compute(predictions=predictions, references=references)
        same(metric.compute(predictions=[2, 1], references=[1, 2]), {"pearson": -1.0, "spearmanr": -1.0})


def test_nothing_is_written_and_no_random_state_changes(tmp_path):
    state = np.random.get_state()[1].copy()
    metric = METRICS["accuracy"](cache_dir=str(tmp_path / "cache"))
    metric.compute(predictions=[1], references=[1])
    assert not list(tmp_path.iterdir())
    assert (np.random.get_state()[1] == state).all()
    assert not METRICS["accuracy"](cache_dir=str(tmp_path / "cache"), num_process=2).keep_in_memory
    on_disk = METRICS["accuracy"](cache_dir=str(tmp_path / "cache"), keep_in_memory=False)
    same(on_disk.compute(predictions=[1, 1], references=[0, 1]), {"accuracy": 0.5})
    assert list(tmp_path.iterdir())


# what can't be scored


def test_an_unknown_name():
    with pytest.raises(UnknownNameError, match=r"^unknown metric 'matthew'; did you mean 'matthews'\?$"):
        compute("matthew", [1], [1])
    with pytest.raises(AttributeError, match="nothing_like_it"):
        hf_glu.tasks.metrics.nothing_like_it  # noqa: B018


def refused(name, predictions, references):
    """Return the one line with which the metric refuses the input."""
    with pytest.raises(DataError) as raised:
        compute(name, predictions, references)
    message = str(raised.value)
    assert message
    assert "\n" not in message
    return message


FUNCTIONS = {
    "accuracy": scores.accuracy,
    "accuracy_f1": scores.f1,
    "matthews": scores.matthews,
    "accuracy_macro_f1": scores.macro_f1,
    "pearson_spearman": scores.pearson,
}
ANY, CLASSES = SCALAR, tuple(name for name in SCALAR if name != "pearson_spearman")
REFUSED = [
    (ANY, [1, 0], [1, 0, 1], "there are 2 predictions but 3 references: one for each is wanted"),
    (ANY, [], [], "there are no predictions to compute a metric of"),
    (ANY, [], [1], "there are 0 predictions but 1 references"),
    (ANY, [1, NAN], [1, 0], "predictions[1] is nan: it must be finite"),
    (ANY, np.float32([INF, 1]), [1, 0], "predictions[0] is inf: it must be finite"),
    (ANY, [1, 0], [1, NAN], "references[1] is nan: it must be finite"),
    (ANY, [1, "0"], [1, 0], "predictions[1] is '0': a "),
    (ANY, [1, 0], [None, 0], "references[0] is None: a "),
    (ANY, [1, 10**30], [1, 0], "predictions[1] is 1000000000000000000000000000000: a "),
    (ANY, [1, 2j], [1, 0], "predictions[1] is 2j: a "),
    (ANY, torch.zeros(2, 2), [1, 0], "predictions have the shape (2, 2): one value for each example is wanted"),
    (ANY, [[1, 2], [3]], [1, 0], "predictions can't be read as numbers: "),
    (ANY, torch.ones(2, requires_grad=True), [1, 0], "predictions can't be read as numbers: "),
    (ANY, iter([1, 0]), [1, 0], "predictions and references must be sequences: "),
    (CLASSES, [1, 0.7], [1, 0], "predictions[1] is 0.7: a class index is wanted, such as logits.argmax(-1)"),
    (CLASSES, [1, 0], [1, 0.5], "references[1] is 0.5: a class index is wanted"),
    (CLASSES, [1, -2], [1, 0], "predictions[1] is -2: classes start at 0, and -1 is no answer"),
    (CLASSES, [1, 1e300], [1, 0], "predictions[1] is 1e+300: the largest class is "),
    (CLASSES, [1, 0], [1, -1], f"references[1] is -1: {scores.UNLABELLED}"),
    (CLASSES, [1, 0], [-1, -1], "references[0] is -1: the split is unlabelled"),
    (("accuracy_f1",), [1, 2], [1, 0], "predictions[1] is 2: the largest class is 1"),
    (("accuracy_f1",), [1, 1], [1, 2], "references[1] is 2: the largest class is 1"),
    (("pearson_spearman",), [1, 2], [-1.0, -1.0], f"all references are -1.0: {scores.UNLABELLED}"),
    (("pearson_spearman",), [1, 2], [2, 2], "all references are 2.0: a correlation needs"),
    (("pearson_spearman",), [1, 1], [2, 2], "all references are 2.0: a correlation needs"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[3][:50])
def test_what_functions_and_metrics_refuse(case):
    names, predictions, references, message = case
    for name in names:
        assert refused(name, predictions, references).startswith(message)
        with pytest.raises(DataError) as raised:
            FUNCTIONS[name](predictions, references)
        assert str(raised.value).startswith(message)


@pytest.mark.parametrize("name", METRICS)
def test_missing_inputs(name):
    metric = METRICS[name]()
    with pytest.raises(DataError, match="there are no predictions to compute a metric of: give some"):
        metric.compute()
    with pytest.raises(DataError, match="there are no references: give both"):
        metric.compute(predictions=[1])
    with pytest.raises(DataError, match="there are no predictions: give both"):
        metric.compute(references=[1])
    with pytest.raises(DataError, match="there are no predictions to compute"):
        metric.compute(predictions=[], references=[])


ZERO, ONE = (0, 0, 0), (0, 0, 1)
MULTIRC_REFUSED = [
    ([answer(ZERO, 1)], [1, 1], "there are 1 predictions but 2 references"),
    ([answer(ZERO, 1), answer(ONE, 1)], [1, -1], "references[1] is -1: the split is unlabelled"),
    ([answer(ZERO, 1), answer(ZERO, 1)], [1, 1], "predictions[1] has the idx {'paragraph': 0, 'question': 0, 'answer'"),
    ([answer(ZERO, NAN)], [1], "predictions[0] is nan: it must be finite"),
    ([answer(ZERO, 0.5)], [1], "predictions[0] is 0.5: a class index"),
    ([answer(ZERO, 2)], [1], "predictions[0] is 2: the largest class is 1"),
    ([answer((0, 0, 0.5), 1)], [1], "predictions[0] is {'idx': "),
    ([{"idx": {"paragraph": 0, "question": 0}, "prediction": 1}], [1], "predictions[0] is {'idx': "),
    (
        [1],
        [1],
        "predictions[0] is 1: {'idx': {'paragraph': int, 'question': int, 'answer': int}, 'prediction': ...} is",
    ),
]
RECORD_REFUSED = [
    ([text((0, 0), "x")], [gold((0, 0), "x"), gold((0, 1), "x")], "there are 1 predictions but 2 references"),
    ([text((0, 0), "x")], [gold((0, 0))], f"references[0] has no gold answer: {scores.UNLABELLED}"),
    ([text((0, 0), None)], [gold((0, 0), "x")], "predictions[0] is None: a string is wanted, '' for no answer"),
    ([text((0, 0), "x")], [gold((0, 0), 3)], "references[0] has the gold answer 3: a string is wanted"),
    ([text((0, 0), "x")], [{"idx": {"passage": 0, "query": 0}, "answers": "x"}], "the gold answers of references[0]"),
    ([text((0, 0), "x")], [gold((0, 1), "x")], "no prediction has the idx {'passage': 0, 'query': 1} of a reference"),
    ([text((0, 0), "x")] * 2, [gold((0, 0), "x"), gold((0, 1), "x")], "predictions[1] has the idx {'passage': 0"),
    ([text((0, 0), "x"), text((0, 1), "x")], [gold((0, 0), "x")] * 2, "references[1] has the idx {'passage': 0"),
    ([{"prediction_text": "x"}], [gold((0, 0), "x")], "predictions[0] is {'prediction_text': 'x'}: {'idx': "),
    ([text((0, 0), "x")], ["x"], "references[0] is 'x': {'idx': {'passage': int, 'query': int}, 'answers': ...} is"),
]


@pytest.mark.parametrize(
    ("name", "case"),
    [*(("multirc", case) for case in MULTIRC_REFUSED), *(("record", case) for case in RECORD_REFUSED)],
)
def test_what_multirc_and_record_refuse(name, case):
    predictions, references, message = case
    assert refused(name, predictions, references).startswith(message)


def test_the_functions_of_groups_and_texts_refuse_the_same():
    with pytest.raises(DataError, match="there are 1 questions but 2 references"):
        scores.question_exact_match([1, 1], [1, 1], [0])
    for score in (scores.record_f1, scores.record_exact_match):
        with pytest.raises(DataError, match="no gold answer"):
            score(["x", "y"], [["x"], []])
        with pytest.raises(DataError, match="no predictions"):
            score([], [])
        with pytest.raises(DataError, match="a list of strings is wanted"):
            score(["x"], [{"text": ["x"]}])


def test_importing_the_room_is_light():
    heavy = ("evaluate", "sklearn", "numpy")
    code = f"import sys, hf_glu.tasks.metrics; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
