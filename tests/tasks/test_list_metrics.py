"""Metrics of several classes for a row and of tags for words: by hand, and against an own reading of entities."""

from __future__ import annotations

import numpy as np
import pytest

from hf_glu.errors import DataError
from hf_glu.tasks.metrics import compute


def lists(seed, count=4, rows=30):
    generator = np.random.default_rng(seed)
    return [np.flatnonzero(generator.random(count) < 0.4).tolist() for _ in range(rows)]


@pytest.mark.parametrize("seed", range(3))
def test_several_classes_are_counted_decision_by_decision(seed):
    given, wanted = lists(seed), lists(seed + 10)
    counts = {
        each: [sum((each in a) == x and (each in b) == y for a, b in zip(given, wanted, strict=True))
               for x, y in ((True, True), (True, False), (False, True))]
        for each in range(4)
    }  # fmt: skip
    right, extra, lacking = (sum(each[at] for each in counts.values()) for at in range(3))
    found = compute("multilabel", given, wanted)
    assert found["micro_f1"] == pytest.approx(2 * right / (2 * right + extra + lacking))
    assert found["macro_f1"] == pytest.approx(np.mean([2 * a / (2 * a + b + c) for a, b, c in counts.values()]))
    assert found["exact_match"] == np.mean([a == b for a, b in zip(given, wanted, strict=True)])


def test_rows_of_no_class_are_right_or_wrong():
    assert compute("multilabel", [[], []], [[], []]) == {"micro_f1": 0.0, "macro_f1": 0.0, "exact_match": 1.0}
    assert compute("multilabel", [[1], []], [[], [1]]) == {"micro_f1": 0.0, "macro_f1": 0.0, "exact_match": 0.0}


def entities(tags):
    """Return the entities of tags that are well formed: first word, words after it of the same kind."""
    found, begin = set(), None
    for at, tag in enumerate([*tags, "O"]):
        if begin is not None and not tag.startswith(("I-", "E-", "L-")):
            found.add((begin, at, tags[begin][2:]))
            begin = None
        if tag[0] in "BSU":
            begin = at
    return found


def sentence(generator, first, last, alone):
    tags = []
    while len(tags) < 12:
        kind, length = generator.choice(["PER", "LOC"]), int(generator.integers(0, 4))
        middle = [f"I-{kind}"] * (length - 2)
        tags += {0: ["O"], 1: [f"{alone}-{kind}"]}.get(length, [f"{first}-{kind}", *middle, f"{last}-{kind}"])
    return tags[:12]


@pytest.mark.parametrize("spelled", ["BIB", "BES", "BLU"])
@pytest.mark.parametrize("seed", range(3))
def test_entities_are_right_as_a_whole(spelled, seed):
    pytest.importorskip("seqeval")
    generator = np.random.default_rng(seed)
    wanted = [sentence(generator, *spelled) for _ in range(20)]
    given = [row if generator.random() < 0.5 else sentence(generator, *spelled) for row in wanted]
    pairs = [(entities(a), entities(b)) for a, b in zip(given, wanted, strict=True)]
    right, said, there = (sum(map(len, each)) for each in zip(*((a & b, a, b) for a, b in pairs), strict=True))
    words = [one == other for a, b in zip(given, wanted, strict=True) for one, other in zip(a, b, strict=True)]
    found = compute("entities", given, wanted)
    assert found == pytest.approx(
        {"precision": right / said, "recall": right / there, "f1": 2 * right / (said + there),
         "accuracy": np.mean(words)}
    )  # fmt: skip


def test_a_word_without_an_answer_is_outside_of_entities_and_no_tag():
    pytest.importorskip("seqeval")
    assert compute("entities", [["B-X", ""]], [["B-X", "I-X"]])["f1"] == 0.0
    assert compute("entities", [["B-X", ""]], [["B-X", "O"]])["accuracy"] == 1.0
    assert compute("tags", [["NN", ""]], [["NN", "O"]]) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("name", "given", "wanted", "says"),
    [
        ("multilabel", [1], [[1]], r"predictions\[0\] is 1: a list of int is wanted"),
        ("multilabel", [[1]], [["a"]], r"references\[0\] is \['a'\]: a list of int is wanted"),
        ("multilabel", [[1]], [[1], [1]], "there are 1 predictions but 2 references"),
        ("tags", [["a"]], [["a", "b"]], r"predictions\[0\] has 1 tags, and its reference 2"),
        ("tags", [[]], [[]], "no reference has a tag"),
        ("entities", [["O"]], [[1]], r"references\[0\] is \[1\]: a list of str is wanted"),
    ],
)
def test_what_can_not_be_counted_is_refused(name, given, wanted, says):
    with pytest.raises(DataError, match=says):
        compute(name, given, wanted)
