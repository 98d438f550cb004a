"""The README is short, its figures are those of result files, and its translation has the same structure."""

import json
import re
from pathlib import Path

import bench_table
import pytest

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
LONGEST = 200
FENCED = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"[+-]?\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")
LINK = re.compile(r"\]\(([^)]+)\)")
OTHER = {"README.md", "README.zh.md"}  # each links to the other


def code_blocks(text):
    """Return the fenced blocks, fences and language included."""
    return FENCED.findall(text)


def heading_levels(text):
    """Return each heading's level; a comment in a code block is no heading."""
    return [len(marks) for marks in re.findall(r"^(#+) ", FENCED.sub("", text), flags=re.MULTILINE)]


def row_numbers(text):
    """Return the numbers of each table row outside of code blocks."""
    return [NUMBER.findall(line) for line in FENCED.sub("", text).split("\n") if line.startswith("|")]


def links(text):
    """Return where the links and pictures lead, in their order."""
    return [link for link in LINK.findall(FENCED.sub("", text)) if link not in OTHER]


PARTS = {"code": code_blocks, "headings": heading_levels, "numbers": row_numbers, "links": links}


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


@pytest.mark.parametrize("path", [ENGLISH, CHINESE], ids=lambda path: path.name)
def test_it_is_short(path):
    assert path.read_text(encoding="utf-8").count("\n") <= LONGEST, "details go to docs/"


def test_each_links_to_the_other():
    assert "(README.zh.md)" in ENGLISH.read_text(encoding="utf-8").split("\n")[2]
    assert "(README.md)" in CHINESE.read_text(encoding="utf-8").split("\n")[2]


def test_its_figures_are_those_of_the_result_files():
    text = ENGLISH.read_text(encoding="utf-8")
    rows = [line for line in text.partition("## Why\n")[2].partition("\n## ")[0].split("\n") if line.startswith("|")][
        2:
    ]
    assert len(rows) == 3
    card = json.loads((ROOT / "model_cards" / "minilm-geglu-movie-reviews.json").read_text(encoding="utf-8"))
    means = {each["name"]: f"{each['mean']:.2%}".replace("%", " %") for each in card["comparison"]["variants"]}
    for name, said in (("geglu", "84.21 %"), ("dense", "dense {}"), ("random-geglu", "{} with the same FFNs")):
        assert said.format(means[name]) in rows[0]
        assert means[name] in rows[0]
    exact = re.search(r"^(\d+ of \d+) exact\.$", (ROOT / "COVERAGE.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert exact[1] in rows[1]
    line = next(line for line in bench_table.LINES if line.contender == "swiglu, save_memory" and line.show == "mean")
    assert f"| {bench_table.memory(line, bench_table.read('fp32'))} |" in rows[2]


SAMPLE = """# Title

| name | loss |
|---|---|
| `relu*2` | 6.0002 ± 0.03, -0.5 |

See [this](docs/a.md).

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
        ("links", "docs/a.md", "docs/b.md"),
        ("links", "[this](docs/a.md)", "this"),
        ("links", "[this](docs/a.md)", "[this](docs/a.md), ![that](docs/a.svg)"),
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
