"""README's table of benches, from what ``hf-glu bench --save`` wrote: ``python recipes/bench_table.py [--language zh]``.

The ratios are `recipes/bench/cpu.json` (float32) and `recipes/bench/cpu-bf16.json`; a test holds README to this table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "bench"
FILES = {"fp32": FOLDER / "cpu.json", "bf16": FOLDER / "cpu-bf16.json"}
MISSED = {"en": ": missed", "zh": "：未达标"}
HEADS = {
    "en": ("bench", "what", "fp32", "bf16", "target", "memory"),
    "zh": ("基准", "内容", "fp32", "bf16", "目标", "内存"),
}
TRAIN, DECODE = {"pass": "forward + backward"}, {"pass": "decode"}
FOUR = "swiglu*2,geglu*2,reglu*2,glu*2"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table.

    Attributes:
        bench, contender: whose rows.
        en, zh: what they are, in words.
        where: what their cells have.
        show: ``each`` ratio, the ``mean`` of all sizes, the ``range``, or the ``seconds``.
    """

    bench: str
    contender: str
    en: str
    zh: str
    where: dict[str, Any] = field(default_factory=dict)
    show: str = "each"


LINES = (
    Line(
        bench="ffn", contender="swiglu", show="mean", en="`swiglu` to stock LlamaMLP, mean of 8 sizes",
        zh="`swiglu` 对比原版 LlamaMLP，8 种尺寸的均值",
    ),
    Line(bench="ffn", contender="swiglu", show="range", en="the same, each size", zh="同上，各尺寸"),
    Line(bench="ffn", contender="swiglu, fused", show="mean", en="with `fuse`, mean", zh="加 `fuse`，均值"),
    Line(bench="ffn", contender="swiglu, fused", show="range", en="the same, each size", zh="同上，各尺寸"),
    Line(
        bench="ffn", contender="swiglu, save_memory", show="mean", en="with `save_memory`, mean",
        zh="加 `save_memory`，均值",
    ),
    Line(bench="ffn", contender="swiglu, fused, save_memory", show="mean", en="with both, mean", zh="两者都加，均值"),
    Line(
        bench="ffn", contender="geglu_new, fused", show="mean", en="`geglu_new` with `fuse` to stock T5's, mean",
        zh="`geglu_new` 加 `fuse` 对比原版 T5，均值",
    ),
    Line(
        bench="ffn", contender="geglu_new, save_memory", show="mean",
        en="`geglu_new` with `save_memory` to stock T5's, mean", zh="`geglu_new` 加 `save_memory` 对比原版 T5，均值",
    ),
    Line(
        bench="ffn", contender="swiglu, fused, to dense", show="range",
        en="`swiglu` with `fuse` to a dense GELU FFN of as many parameters, each size",
        zh="`swiglu` 加 `fuse` 对比参数量相同的稠密 GELU FFN，各尺寸",
    ),
    Line(
        bench="ffn", contender="swiglu, fused, to compiled",
        en="`swiglu` with `fuse` to compiled LlamaMLP (768, 2048); 256, 1024, 4096 tokens",
        zh="`swiglu` 加 `fuse` 对比编译后的 LlamaMLP（768, 2048）；256、1024、4096 个 token",
    ),
    Line(
        bench="sparsity", contender="skip_zeros", en="`skip_zeros`, one token, 50, 80, 90, 95 % of the units closed",
        zh="`skip_zeros`，一个 token，50、80、90、95 % 的单元关闭",
    ),
    Line(
        bench="whole", contender="swiglu, iso width",
        en="fine-tuning step of a BERT of MiniLM's shape, iso-`swiglu` to dense; memory is the step's peak",
        zh="微调 MiniLM 形状的 BERT 的一步，iso-`swiglu` 对比稠密；内存为该步的峰值",
    ),
    Line(
        bench="whole", contender="swiglu, iso width, save_memory", en="the same with `save_memory`",
        zh="同上，加 `save_memory`",
    ),
    Line(bench="whole", contender="geglu, width kept", en="`geglu` of full width", zh="全宽 `geglu`"),
    Line(
        bench="whole", contender="swiglu", en="decoding, Llama of SmolLM-135M's shape, `swiglu` (the stock model itself)",
        zh="解码，SmolLM-135M 形状的 Llama，`swiglu`（即原版模型）",
    ),
    Line(bench="whole", contender="stateful_swiglu", en="the same, `stateful_swiglu`", zh="同上，`stateful_swiglu`"),
    Line(
        bench="whole", contender=FOUR, en="decoding, four activations to stock Mixtral's fastest",
        zh="解码，四种激活函数对比原版 Mixtral 的最快实现",
    ),
    Line(
        bench="experts", contender="homogeneous", where=TRAIN,
        en="`swiglu*8`, top 2, to stock Mixtral's fastest; 512, 1024, 2048, 4096 tokens",
        zh="`swiglu*8`，top 2，对比原版 Mixtral 的最快实现；512、1024、2048、4096 个 token",
    ),
    Line(
        bench="experts", contender="heterogeneous", where=TRAIN, en="four activations to one", zh="四种激活函数对比一种"
    ),
    Line(
        bench="experts", contender="homogeneous", where=DECODE, en="decoding 4 tokens, `swiglu*8` to stock's fastest",
        zh="解码 4 个 token，`swiglu*8` 对比原版的最快实现",
    ),
    Line(
        bench="experts", contender="heterogeneous", where=DECODE,
        en="decoding 4 tokens, four activations to stock's fastest", zh="解码 4 个 token，四种激活函数对比原版的最快实现",
    ),
    Line(
        bench="scan", contender="hf_glu.scan", en="the recurrence to autograd through a loop over tokens",
        zh="递推对比 autograd 对逐 token 循环求导",
    ),
    Line(
        bench="scan", contender="16,384 tokens, 16,384 in all", en="a token's cost in 16,384 to 2,048",
        zh="单个 token 的开销，16,384 个对比 2,048 个",
    ),
    Line(
        bench="scan", contender="stateful_swiglu", en="FFN 768 -> 2048, `stateful_swiglu` to `swiglu`",
        zh="FFN 768 -> 2048，`stateful_swiglu` 对比 `swiglu`",
    ),
    Line(
        bench="activations", contender="modulated_swiglu", en="`modulated_swiglu` to `swiglu`",
        zh="`modulated_swiglu` 对比 `swiglu`",
    ),
    Line(
        bench="activations", contender="learnable_swiglu", en="`learnable_swiglu`, 4 functions",
        zh="`learnable_swiglu`，4 个函数",
    ),
    Line(bench="activations", contender="moa_swiglu", en="`moa_swiglu`, 4 functions", zh="`moa_swiglu`，4 个函数"),
    Line(
        bench="start", contender="import hf_glu", en="`import hf_glu` to `import torch`",
        zh="`import hf_glu` 对比 `import torch`",
    ),
    Line(
        bench="start", contender="import hf_glu and BertModel",
        en="`import hf_glu` and a class of Transformers to the class alone", zh="`import hf_glu` 加 Transformers 的一个类对比只导入该类",
    ),
    Line(bench="start", contender="hf-glu --help", show="seconds", en="`hf-glu --help`, seconds", zh="`hf-glu --help`，秒"),
    Line(
        bench="start", contender="convert to geglu", show="seconds", en="converting the real BERT, seconds",
        zh="转换真实的 BERT，秒",
    ),
)  # fmt: skip
Data = dict[str, Any]


def read(path: Path) -> dict[str, Data]:
    """Return the benches of a file by name; none where there is no file."""
    benches = json.loads(path.read_text(encoding="utf-8"))["benches"] if path.exists() else []
    return {bench["bench"]: bench for bench in benches}


def rows(line: Line, benches: dict[str, Data]) -> list[Data]:
    """Return the rows of a line."""
    found = benches.get(line.bench, {}).get("rows", [])
    return [
        row
        for row in found
        if row["contender"] == line.contender and row["ratio"] and line.where.items() <= row["cell"].items()
    ]


def ratio(line: Line, benches: dict[str, Data], language: str) -> str:
    """Return what a line says of one run; what missed its target in bold."""
    found, missed = rows(line, benches), MISSED[language]
    if not found:
        return "-"
    if line.show == "mean":
        mean = next(mean for mean in benches[line.bench]["means"] if mean["contender"] == line.contender)
        return _bold(f"{mean['ratio']:.2f}", missed, met=mean["met"])
    if line.show == "range":
        ratios, misses = [row["ratio"]["median"] for row in found], sum(not row["met"] for row in found)
        of = "{}: {} of {} missed" if language == "en" else "{}：{} / {} 未达标"
        span = f"{min(ratios):.2f} - {max(ratios):.2f}"
        return f"**{of.format(span, misses, len(found))}**" if misses else span
    part = "seconds" if line.show == "seconds" else "ratio"
    return ", ".join(_bold(f"{row[part]['median']:.2f}", missed, met=row["met"] is not False) for row in found)


def _bold(text: str, missed: str, *, met: bool) -> str:
    return text if met else f"**{text}{missed}**"


def target(line: Line, benches: dict[str, Data]) -> str:
    """Return a line's targets, each once."""
    if line.show == "mean":
        return f"{next(m for m in benches[line.bench]['means'] if m['contender'] == line.contender)['target']:.2f}"
    key = "limit" if line.show == "seconds" else "target"
    values = [f"{row[key]:.2f}" for row in rows(line, benches) if row[key] is not None]
    return ", ".join(values if len(set(values)) > 1 else values[:1])


def memory(line: Line, benches: dict[str, Data], missed: str) -> str:
    """Return the ratio of what is kept, or of the peak, which hardly depends on the size."""
    if line.show == "range":
        return ""
    found = [row for row in rows(line, benches) if row["saved_ratio"] is not None]
    return "" if not found else _bold(f"{found[0]['saved_ratio']:.2f}", missed, met=found[0]["saved_met"] is not False)


def table(runs: dict[str, dict[str, Data]], language: str = "en") -> str:
    """Return the table in Markdown."""
    lines, before = [HEADS[language], ("---",) * len(HEADS[language])], ""
    for line in LINES:
        name = f"`{line.bench}`" if line.bench != before else ""
        ratios = [ratio(line, benches, language) for benches in runs.values()]
        fp32 = runs["fp32"]
        lines.append((name, getattr(line, language), *ratios, target(line, fp32), memory(line, fp32, MISSED[language])))
        before = line.bench
    return "\n".join(_joined(cells) for cells in lines)


def _joined(cells: Iterable[str]) -> str:
    cells = list(cells)
    if cells[0] == "---":
        return "|" + "|".join(cells) + "|"
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language", choices=sorted(HEADS), default="en", help="of the table: %(default)s")
    print(table({dtype: read(path) for dtype, path in FILES.items()}, parser.parse_args().language))


if __name__ == "__main__":
    main()
