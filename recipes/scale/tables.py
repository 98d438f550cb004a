"""What full-width geglu, iso width and experts cost at 1B to 70B on 8 to 512 GPUs: on paper, checked on small points.

Prints the tables of recipes/SCALE.md, which says what they rest on. Ratios are to the dense model of the same size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hf_glu.config.glu import iso_width
from recipes.scale.formulas import (
    Memory,
    Shape,
    StepTime,
    conversion_cost,
    parameters,
    step_time,
    training_flops,
    training_memory,
)

Data = dict[str, Any]
EXPERTS, TOP_K, GPUS = 8, 2, (8, 64, 512)
# assumptions: of a GPU (H100 SXM) and its node of eight, of the job, and of the machine that converts
PEAK, EFFICIENCY, CAPACITY, NODE = 989e12, 0.4, 80.0, 8
BANDWIDTH, REACHED = {"inside": 450e9, "across": 400e9}, 0.7
SEQUENCE, SEQUENCES = 4096, 2
DISK, CONSTANT = 2e9, 0.42e9
GB = 1e9

LLAMA = {"ffn": "native", "block": "llama"}
GPT2 = {"ffn": "dense", "block": "gpt2", "vocab": 50257, "positions": 4096, "tied": True}
BASES = {
    "GPT 1B": Shape(hidden=2048, width=8192, layers=24, heads=16, kv_heads=16, **GPT2),
    "GPT 7B": Shape(hidden=4096, width=16384, layers=32, heads=32, kv_heads=32, **GPT2),
    "GPT 70B": Shape(hidden=8192, width=32768, layers=86, heads=64, kv_heads=64, **GPT2),
    "Llama 1B": Shape(hidden=2048, width=8192, layers=16, heads=32, kv_heads=8, vocab=128256, tied=True, **LLAMA),
    "Llama 7B": Shape(hidden=4096, width=11008, layers=32, heads=32, kv_heads=32, vocab=32000, **LLAMA),
    "Llama 70B": Shape(hidden=8192, width=28672, layers=80, heads=64, kv_heads=8, vocab=128256, **LLAMA),
    "Mixtral 8x7B": Shape(
        hidden=4096, width=14336, layers=32, heads=32, kv_heads=8, vocab=32000, experts=EXPERTS, top_k=TOP_K, **LLAMA
    ),
}  # fmt: skip
STOCK, FULL, ISO, ROUTED = "stock", "geglu", "geglu, iso width", f"{EXPERTS} experts, top {TOP_K}"


def variants(base: Shape) -> dict[str, Shape]:
    """Return the model and what it is converted to; a gate's own family changes its activation at no cost."""
    made = {STOCK: base}
    if base.ffn == "dense":
        made[FULL] = replace(base, ffn="fused")
        made[ISO] = replace(base, ffn="fused", width=iso_width(base.width))
    if not base.experts:
        made[ROUTED] = replace(base, ffn="fused", experts=EXPERTS, top_k=TOP_K)
    return made


def named_shapes() -> list[tuple[str, str, Shape, Shape]]:
    """Return size, variant, its shape and the stock one's."""
    return [(size, name, shape, base) for size, base in BASES.items() for name, shape in variants(base).items()]


def memory(
    shape: Shape, gpus: int, *, save_memory: bool = False, checkpointing: bool = True, share: bool = True
) -> Memory:
    """Return a GPU's memory; with ``share``, a node's GPUs have an expert each."""
    return training_memory(
        shape, tokens=SEQUENCE * SEQUENCES, sharding=gpus, expert_parallel=max(1, shape.experts * share),
        save_memory=save_memory, checkpointing=checkpointing,
    )  # fmt: skip


def time(shape: Shape, gpus: int, *, share: bool = True) -> StepTime:
    """Return a step's time; with ``share``, a node's GPUs have an expert each."""
    return step_time(
        shape, tokens=SEQUENCE * SEQUENCES, sequence=SEQUENCE, devices=gpus, flops=PEAK, efficiency=EFFICIENCY,
        bandwidth=REACHED * BANDWIDTH["inside" if gpus <= NODE else "across"],
        expert_parallel=max(1, shape.experts * share), expert_bandwidth=REACHED * BANDWIDTH["inside"],
        checkpointing=True,
    )  # fmt: skip


def sizes() -> list[Data]:
    """Return the rows of parameters and FLOPs."""
    rows = []
    for size, name, shape, base in named_shapes():
        ours, stock = parameters(shape), parameters(base)
        flops = [training_flops(each, sequence=SEQUENCE) for each in (shape, base)]
        rows.append({
            "model": size, "variant": name, "width": f"{shape.width}", "total": f"{ours.total:,}",
            "active": f"{ours.active:,}", "x total": f"{ours.total / stock.total:.2f}",
            "x active": f"{ours.active / stock.active:.2f}", "x FLOPs": f"{flops[0] / flops[1]:.2f}",
        })  # fmt: skip
    return rows


def memories() -> list[Data]:
    """Return the rows of memory: at 64 GPUs by term, and the sum at each number of GPUs."""
    rows = []
    for size, name, shape, base in named_shapes():
        terms, whole, stock = memory(shape, 64), memory(shape, 64, checkpointing=False), memory(base, 64)
        lean = name in (FULL, ISO)
        rows.append({
            "model": size, "variant": name,
            **{key: f"{getattr(terms, key) / GB:.2f}" for key in ("weights", "gradients", "optimizer", "gathered")},
            "kept": f"{terms.kept / GB:.1f}", "loss": f"{terms.loss / GB:.1f}",
            **{f"sum, {gpus}": fitting(memory(shape, gpus).total / GB) for gpus in GPUS},
            "x sum, 64": f"{terms.total / stock.total:.2f}",
            "kept, no checkpointing": fitting(whole.kept / GB),
            "x kept": f"{whole.kept / memory(base, 64, checkpointing=False).kept:.2f}",
            "x with save_memory": f"{_lean(shape) / memory(base, 64, checkpointing=False).kept:.2f}" if lean else "-",
        })  # fmt: skip
    return rows


def fitting(gigabytes: float) -> str:
    """Return a number, in parentheses where it is more than a GPU has."""
    return f"{gigabytes:.1f}" if gigabytes <= CAPACITY else f"({gigabytes:.1f})"


def _lean(shape: Shape) -> float:
    return float(memory(shape, 64, save_memory=True, checkpointing=False).kept)


def times() -> list[Data]:
    """Return the rows of step time: from all of FSDP's communication hidden behind the arithmetic to none of it."""
    rows = []
    for size, name, shape, base in named_shapes():
        row: Data = {"model": size, "variant": name, "compute, s": f"{time(shape, 8).compute:.2f}"}
        row["all-to-all, s"] = f"{time(shape, 8).experts:.2f}" if shape.experts else "-"
        for gpus in GPUS:
            ours, stock = time(shape, gpus), time(base, gpus)
            row[f"FSDP, s, {gpus}"] = f"{ours.fsdp:.2f}"
            row[f"step, s, {gpus}"] = f"{ours.overlapped:.2f} to {ours.exposed:.2f}"
            ratios = (ours.overlapped / stock.overlapped, ours.exposed / stock.exposed)
            row[f"x, {gpus}"] = " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in ratios))
        rows.append(row)
    return rows


def unshared() -> list[Data]:
    """Return the rows of experts that every GPU gathers all of, at 64 GPUs, beside expert parallelism."""
    rows = []
    for size, name, shape, _ in named_shapes():
        if shape.experts:
            (near, far), (held, more) = (
                [call(shape, 64, share=share) for share in (True, False)] for call in (time, memory)
            )
            rows.append({
                "model": size, "variant": name, "gathered, GB": f"{more.gathered / GB:.1f}",
                "x gathered": f"{more.gathered / held.gathered:.1f}", "sum, GB": fitting(more.total / GB),
                "FSDP, s": f"{far.fsdp:.2f}", "step, s": f"{far.overlapped:.2f} to {far.exposed:.2f}",
                "x step": f"{far.overlapped / near.overlapped:.2f} to {far.exposed / near.exposed:.2f}",
            })  # fmt: skip
    return rows


def conversions() -> list[Data]:
    """Return the rows of conversion: memory and the least time on the disk."""
    rows = []
    for size, name, shape, base in named_shapes():
        if name == STOCK:
            continue
        ways = (False, True) if name == FULL else (False,)  # a fit and experts need the model in memory
        cost = {stream: conversion_cost(base, shape, disk=DISK, constant=CONSTANT, stream=stream) for stream in ways}
        rows.append({
            "model": size, "variant": name, "in memory, GB": f"{cost[False]['memory'] / GB:.1f}",
            "streaming, GB": f"{cost[True]['memory'] / GB:.1f}" if True in cost else "-",
            "disk, s": f"{cost[False]['seconds']:.0f}",
        })  # fmt: skip
    return rows


TABLES = {
    "Parameters and FLOPs": sizes,
    "Memory of one GPU, GB": memories,
    "Step time": times,
    "Experts without expert parallelism, 64 GPUs": unshared,
    "Conversion": conversions,
}


def markdown(rows: list[Data]) -> str:
    """Return rows as a Markdown table."""
    lines = [list(rows[0]), ["---", "---", *["--:"] * (len(rows[0]) - 2)], *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
