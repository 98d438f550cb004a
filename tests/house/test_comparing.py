"""The helpers that compare can fail, and those that choose quick cases leave no value out."""

import pytest
import torch
from comparing import TOLERANCE, assert_same, outputs
from covering import alternating, covering
from pico import FAMILIES

from hf_glu.errors import OptionError
from hf_glu.instruments.probe import max_abs_difference


@pytest.mark.parametrize("tolerance", TOLERANCE)
def test_assert_same_fails_beyond_its_tolerance(tolerance):
    absolute = TOLERANCE[tolerance][1]
    expected = torch.zeros(3, 4, dtype=torch.float64)
    actual = expected.clone()
    actual[2, 3] = 2 * absolute + 1e-300
    with pytest.raises(AssertionError):
        assert_same(actual, expected, tolerance)
    assert_same(expected.clone(), expected, tolerance)


def test_assert_same_refuses_to_compare_nothing():
    with pytest.raises(AssertionError):
        assert_same({}, {}, "bitwise")
    with pytest.raises(AssertionError):
        assert_same(torch.empty(0), torch.empty(0), "bitwise")
    with pytest.raises(AssertionError):
        assert_same({"a": torch.ones(1)}, {"b": torch.ones(1)}, "bitwise")


def test_outputs_see_a_single_weight():
    model = FAMILIES["bert"].make()
    before = outputs(model)
    model.bert.encoder.layer[1].output.dense.weight.data[3, 5] += 1e-2
    with pytest.raises(AssertionError):
        assert_same(outputs(model), before, "exact")


def test_max_abs_difference_sees_nan_and_refuses_unlike_outputs():
    a, b = torch.zeros(4), torch.tensor([0.0, float("nan"), 0.0, 0.0])
    assert max_abs_difference({"x": a}, {"x": b})["x"] != 0
    assert max_abs_difference({"x": b}, {"x": b})["x"] == 0
    with pytest.raises(OptionError, match="kind"):
        max_abs_difference({"x": a}, {"y": a})
    with pytest.raises(OptionError, match="shape"):
        max_abs_difference({"x": a}, {"x": a[:2]})


def quick(cases):
    return [case.values for case in cases if not case.marks]


def test_quick_cases_have_every_value():
    cases = covering("abc", [1, 2], [True])
    assert [case.values for case in cases] == [(letter, n, True) for letter in "abc" for n in (1, 2)]
    assert quick(cases) == [("a", 1, True), ("b", 2, True), ("c", 1, True)]
    cases = alternating([("x", 1), ("x", 2), ("x", 3), ("y", 1), ("z", 1), ("z", 2), ("z", 3)])
    assert len(cases) == 7
    assert {*quick(cases)} == {("x", 1), ("x", 2), ("y", 1), ("z", 3), ("z", 1)}
