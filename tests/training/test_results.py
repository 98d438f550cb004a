"""The typed dictionaries of results say what is written, key by key; that the check can fail."""

from __future__ import annotations

import copy

import pytest
from typed import untyped

from hf_glu.training.results import ComparisonTable, Results, SuiteTable

RESULTS: Results = {
    "task": "rte",
    "main": ["accuracy"],
    "score": 0.5,
    "metrics": {"accuracy": 0.5},
    "before": None,
    "examples": {"train": 8, "validation": 4},
    "parameters": 10,
    "active_parameters": 10,
    "trainable": 10,
    "training": {"steps": 1, "seconds": 0.1, "loss": 0.7, "tokens_per_second": 9.0, "stopped_early": False},
    "conversion": None,
    "activations": [{"layer": 0}],
    "adaptive": [],
    "experts": [],
    "reloaded_equal": None,
}
SUITE: SuiteTable = {
    "suite": "glue",
    "model": "m",
    "activation": None,
    "tasks": {"rte": RESULTS},
    "score": 0.5,
    "partial": True,
    "missing": ["cola"],
}


def test_what_fits_is_nothing_to_tell():
    assert not untyped(RESULTS, Results)
    assert not untyped(SUITE, SuiteTable)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("score",), "high", "/tasks/rte/score: str, not float"),
        (("training", "steps"), 1.5, "/tasks/rte/training/steps: float, not int"),
        (("training", "stopped_early"), 1, "/tasks/rte/training/stopped_early: int, not bool"),
        (("more",), 1, "/tasks/rte/more: unknown"),
        (("main",), "accuracy", "/tasks/rte/main: no list"),
        (("before",), {"accuracy": "?"}, "/tasks/rte/before/accuracy: str, not float"),
    ],
)
def test_the_check_of_types_can_fail(path, value, told):
    table = copy.deepcopy(SUITE)
    place = table["tasks"]["rte"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert untyped(table, SuiteTable) == [told]


def test_a_missing_key_is_told():
    table = {"task": "rte", "model": "m", "metric": "accuracy", "seeds": [0], "variants": []}
    assert untyped(table, ComparisonTable) == ["/baseline: missing"]
