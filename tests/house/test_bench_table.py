"""The documents' table of benches is that of the committed runs."""

from dataclasses import replace
from pathlib import Path

import bench_table

PAGE = Path(__file__).parents[2] / "docs" / "results" / "benchmarks.md"


def test_the_table_of_benches_is_that_of_the_committed_runs():
    runs = {dtype: bench_table.read(dtype) for dtype in bench_table.FILES}
    assert bench_table.table(runs) in PAGE.read_text(encoding="utf-8")
    missing = [line for line in bench_table.LINES if not bench_table.rows(line, runs["fp32"])]
    assert not missing


def test_a_line_says_what_was_missed():
    def row(median, *, met, tokens):
        ratio, seconds = {"median": median}, {"median": median / 2}
        return {
            "contender": "c", "cell": {"tokens": tokens}, "ratio": ratio, "seconds": seconds, "target": 1.0,
            "limit": 2.0, "met": met, "saved_ratio": 0.5, "saved_met": None,
        }  # fmt: skip

    rows = [row(0.5, met=True, tokens=1), row(2.0, met=False, tokens=2)]
    benches = {"b": {"rows": rows, "means": [{"contender": "c", "ratio": 1.25, "target": 0.97, "met": False}]}}
    line = bench_table.Line(bench="b", contender="c", what="")
    assert bench_table.ratio(line, benches) == "0.50, **2.00: missed**"
    assert bench_table.ratio(replace(line, where={"tokens": 1}), benches) == "0.50"
    assert (
        bench_table.ratio(replace(line, show="range"), benches)
        == f"**{bench_table.WORDS['range'].format(span='0.50 - 2.00', misses=1, count=2)}**"
    )
    assert bench_table.ratio(replace(line, show="mean"), benches) == "**1.25: missed**"
    assert bench_table.ratio(replace(line, show="seconds"), benches) == "0.25, **1.00: missed**"
    assert bench_table.ratio(replace(line, contender="d"), benches) == "-"
    assert bench_table.target(replace(line, show="mean"), benches) == "0.97"
    assert bench_table.target(replace(line, show="seconds"), benches) == "2.00"
    assert bench_table.memory(line, benches) == "0.50"
