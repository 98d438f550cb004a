"""The README and its translation say the same: equal code, headings level by level, equal numbers in the tables."""

import re
from dataclasses import replace
from pathlib import Path

import bench_table
import pytest

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
FENCED = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"[+-]?\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")


def code_blocks(text):
    """Return the fenced blocks, fences and language included."""
    return FENCED.findall(text)


def heading_levels(text):
    """Return each heading's level; a comment in a code block is no heading."""
    return [len(marks) for marks in re.findall(r"^(#+) ", FENCED.sub("", text), flags=re.MULTILINE)]


def row_numbers(text):
    """Return the numbers of each table row outside of code blocks."""
    return [NUMBER.findall(line) for line in FENCED.sub("", text).split("\n") if line.startswith("|")]


PARTS = {"code": code_blocks, "headings": heading_levels, "numbers": row_numbers}


def assert_same_parts(part, actual, expected):
    """Compare one kind of part one by one; nothing at all is no agreement."""
    actual, expected = PARTS[part](actual), PARTS[part](expected)
    assert expected, f"no {part} to compare"
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=False)):
        assert ours == theirs, f"{part}, number {i + 1}"
    assert len(actual) == len(expected), part


@pytest.mark.parametrize("part", PARTS)
def test_the_translation_has_the_same(part):
    assert_same_parts(part, CHINESE.read_text(encoding="utf-8"), ENGLISH.read_text(encoding="utf-8"))


def test_each_links_to_the_other():
    assert "(README.zh.md)" in ENGLISH.read_text(encoding="utf-8").split("\n")[2]
    assert "(README.md)" in CHINESE.read_text(encoding="utf-8").split("\n")[2]


SAMPLE = """# Title

| name | loss |
|---|---|
| `relu*2` | 6.0002 ± 0.03, -0.5 |

## Code

```python
x = 1  # one
# no heading
```

```
| 3 |
```
"""


@pytest.mark.parametrize(
    ("part", "old", "new"),
    [
        ("code", "# one", "# eins"),
        ("code", "```python", "```"),
        ("code", "```\n| 3 |\n```\n", ""),
        ("code", "# no heading\n```", "# no heading"),
        ("headings", "## Code", "### Code"),
        ("headings", "## Code", "Code"),
        ("headings", "## Code", "## Code\n\n## More"),
        ("numbers", "6.0002", "6.0003"),
        ("numbers", "-0.5", "0.5"),
        ("numbers", "relu*2", "relu*3"),
        ("numbers", "-0.5 |", "-0.5 |\n| `gelu*8` | 1 |"),
        ("numbers", "| name | loss |\n", ""),
    ],
)
def test_each_comparison_fails(part, old, new):
    assert SAMPLE.count(old) == 1
    with pytest.raises(AssertionError):
        assert_same_parts(part, SAMPLE.replace(old, new), SAMPLE)


@pytest.mark.parametrize("part", PARTS)
def test_comparing_nothing_fails_and_other_words_pass(part):
    with pytest.raises(AssertionError, match="no "):
        assert_same_parts(part, "words", "words")
    assert_same_parts(part, SAMPLE.replace("Title", "标题").replace("loss", "损失"), SAMPLE)


@pytest.mark.parametrize(("language", "path"), [("en", ENGLISH), ("zh", CHINESE)])
def test_the_table_of_benches_is_that_of_the_committed_runs(language, path):
    runs = {dtype: bench_table.read(file) for dtype, file in bench_table.FILES.items()}
    assert bench_table.table(runs, language) in path.read_text(encoding="utf-8")
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
    line = bench_table.Line(bench="b", contender="c", en="", zh="")
    assert bench_table.ratio(line, benches, "en") == "0.50, **2.00: missed**"
    assert bench_table.ratio(replace(line, where={"tokens": 1}), benches, "en") == "0.50"
    assert (
        bench_table.ratio(replace(line, show="range"), benches, "zh")
        == f"**{bench_table.WORDS['range']['zh'].format(span='0.50 - 2.00', misses=1, count=2)}**"
    )
    assert bench_table.ratio(replace(line, show="mean"), benches, "en") == "**1.25: missed**"
    assert bench_table.ratio(replace(line, show="seconds"), benches, "en") == "0.25, **1.00: missed**"
    assert bench_table.ratio(replace(line, contender="d"), benches, "en") == "-"
    assert bench_table.target(replace(line, show="mean"), benches) == "0.97"
    assert bench_table.target(replace(line, show="seconds"), benches) == "2.00"
    assert bench_table.memory(line, benches, ": missed") == "0.50"
