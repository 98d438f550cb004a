"""The table of versions says what pytest said."""

from pathlib import Path

import pytest

nox = pytest.importorskip("nox")
noxfile = pytest.importorskip("noxfile")

SAID = """..F.s
SKIPPED [2] tests/a.py:3: OPT has no static cache
SKIPPED [1] tests/b.py:9: onnx isn't installed
FAILED tests/a.py::test_x - AssertionError
1 failed, 120 passed, 3 skipped, 2 errors in 3.21s
"""


def test_counts_and_reasons_are_read():
    assert noxfile.counts(SAID) == {"passed": 120, "failed": 3, "skipped": 3}
    assert noxfile.counts("no tests ran in 0.01s") == {"passed": 0, "failed": 0, "skipped": 0}
    assert noxfile.reasons(SAID) == ["OPT has no static cache (2)", "onnx isn't installed (1)"]


def test_a_row_for_each_environment_and_its_skips():
    have = {"python": "3.11", "torch": "2.6", "transformers": "5.6", "accelerate": "1", "peft": "0"}
    row = {**have, "tests": "fast", "passed": 5}
    page = noxfile.table_of({"floor": {**row, "failed": 0, "skipped": 1, "skips": ["why (1)"]}})
    assert "| floor | 3.11 | 2.6 | 5.6 | 1 | 0 | fast | 5 | 0 | 1 |" in page
    assert "Skipped in floor:" in page
    assert "- why (1)" in page


def test_the_telling_tests_are_there_and_the_floors_are_the_projects():
    root = Path(noxfile.__file__).parent
    assert all((root / name).exists() for name in noxfile.TELLING)
    floor = noxfile.VERSIONS["floor"]
    assert floor.torch == "torch==2.6.*"
    assert {"transformers==5.6.*", "accelerate==1.12.*", "peft==0.20.*", "scikit-learn==1.5.*"} <= set(floor.rest)
