"""The documents' table of benches, from what ``hf-glu bench --save`` wrote: ``python recipes/bench_table.py``.

The ratios are `recipes/bench/cpu.json` and `start.json` (float32), and `cpu-bf16.json`; a test holds
docs/results/benchmarks.md to this table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "bench"
FILES = {"fp32": (FOLDER / "cpu.json", FOLDER / "start.json"), "bf16": (FOLDER / "cpu-bf16.json",)}
WORDS = json.loads((FOLDER / "table.json").read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table.

    Attributes:
        bench, contender: whose rows.
        what: what they are, in words.
        where: what their cells have.
        show: ``each`` ratio, the ``mean`` of all sizes, the ``range``, or the ``seconds``.
    """

    bench: str
    contender: str
    what: str
    where: dict[str, Any] = field(default_factory=dict)
    show: str = "each"


LINES = tuple(Line(**line) for line in WORDS["lines"])
Data = dict[str, Any]


def read(dtype: str) -> dict[str, Data]:
    """Return the benches of a dtype by name."""
    found = [json.loads(path.read_text(encoding="utf-8"))["benches"] for path in FILES[dtype]]
    return {bench["bench"]: bench for benches in found for bench in benches}


def rows(line: Line, benches: dict[str, Data]) -> list[Data]:
    """Return the rows of a line."""
    found = benches.get(line.bench, {}).get("rows", [])
    return [
        row
        for row in found
        if row["contender"] == line.contender and row["ratio"] and line.where.items() <= row["cell"].items()
    ]


def ratio(line: Line, benches: dict[str, Data]) -> str:
    """Return what a line says of one run; what missed its target in bold."""
    found = rows(line, benches)
    if not found:
        return "-"
    if line.show == "mean":
        mean = next(mean for mean in benches[line.bench]["means"] if mean["contender"] == line.contender)
        return _bold(f"{mean['ratio']:.2f}", met=mean["met"])
    if line.show == "range":
        ratios, misses = [row["ratio"]["median"] for row in found], sum(not row["met"] for row in found)
        span = f"{min(ratios):.2f} - {max(ratios):.2f}"
        words = WORDS["range"].format(span=span, misses=misses, count=len(found))
        return f"**{words}**" if misses else span
    part = "seconds" if line.show == "seconds" else "ratio"
    return ", ".join(_bold(f"{row[part]['median']:.2f}", met=row["met"] is not False) for row in found)


def _bold(text: str, *, met: bool) -> str:
    return text if met else f"**{text}{WORDS['missed']}**"


def target(line: Line, benches: dict[str, Data]) -> str:
    """Return a line's targets, each once."""
    if line.show == "mean":
        return f"{next(m for m in benches[line.bench]['means'] if m['contender'] == line.contender)['target']:.2f}"
    key = "limit" if line.show == "seconds" else "target"
    values = [f"{row[key]:.2f}" for row in rows(line, benches) if row[key] is not None]
    return ", ".join(values if len(set(values)) > 1 else values[:1])


def memory(line: Line, benches: dict[str, Data]) -> str:
    """Return the ratio of what is kept, or of the peak, which hardly depends on the size."""
    if line.show == "range":
        return ""
    found = [row for row in rows(line, benches) if row["saved_ratio"] is not None]
    return "" if not found else _bold(f"{found[0]['saved_ratio']:.2f}", met=found[0]["saved_met"] is not False)


def table(runs: dict[str, dict[str, Data]]) -> str:
    """Return the table in Markdown."""
    heads = WORDS["heads"]
    lines, before = [heads, ["---"] * len(heads)], ""
    for line in LINES:
        name = f"`{line.bench}`" if line.bench != before else ""
        ratios, fp32 = [ratio(line, benches) for benches in runs.values()], runs["fp32"]
        lines.append((name, line.what, *ratios, target(line, fp32), memory(line, fp32)))
        before = line.bench
    return "\n".join(_joined(cells) for cells in lines)


def _joined(cells: Iterable[str]) -> str:
    cells = list(cells)
    if cells[0] == "---":
        return "|" + "|".join(cells) + "|"
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def main() -> None:
    """Print the table."""
    print(table({dtype: read(dtype) for dtype in FILES}))


if __name__ == "__main__":
    main()
