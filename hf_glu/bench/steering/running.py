"""The whole measurement: splits of the texts, ways of steering, strengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_glu.bench.steering.curves import to_row
from hf_glu.bench.steering.judging import Judge, ProbeJudge, load_judge
from hf_glu.bench.steering.measuring import SteeringBench, stretch
from hf_glu.bench.steering.options import SteerOptions, Texts, read_sides, split
from hf_glu.bench.steering.ways import GATES, make_ways
from hf_glu.checkpoint.loading import load_model, load_tokenizer, read_texts
from hf_glu.conversion.held_out import is_causal
from hf_glu.errors import OptionError
from hf_glu.publishing.modulations import GateModulation
from hf_glu.training.comparing.statistics import interval

WORDS = 3  # of a held-out text, as a prompt
NEUTRAL = 32  # texts at most
LONGEST = 64  # tokens of a neutral text


def steer(
    source: str, positive: Path, negative: Path, options: SteerOptions, on_row: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, Any], GateModulation]:
    """Measure ways of steering a causal language model.

    Args:
        source: the model's folder or Hub id.
        positive, negative: files of texts of the two classes, a text a line.
        options: of the measurement.
        on_row: called with a line about each way that is done.

    Returns:
        Plain data: of each way and seed a curve, and each way's mean area with its interval; and the first seed's
        modulation of gates.

    Raises:
        HfGluError: a file, model or option that can't be used.
    """
    sides = read_sides(positive, negative)
    prompts = read_texts(Path(options.prompts)) if options.prompts else None
    neutral = read_texts(Path(options.neutral)) if options.neutral else None
    tokenizer, model = load_tokenizer(source), load_model(source, dtype=torch.float32).eval()
    if not is_causal(model):
        raise OptionError(f"{source} is no causal language model: {type(model).__name__} writes nothing that is scored")
    classifier = None
    if options.classifier:
        classifier = load_judge(options.classifier, options.label, tokenizer, options.batch_size)
    rows: list[dict[str, Any]] = []
    made: GateModulation | None = None
    judged: dict[str, Any] = {}
    for seed in options.splits():
        texts = split(sides, seed)
        judge: Judge = classifier or ProbeJudge(model, tokenizer, texts, options.batch_size)
        judged = {"about": judge.about, "accuracy": judge.accuracy}
        bench = SteeringBench(
            model=model, tokenizer=tokenizer, judge=judge, prompts=_prompts(tokenizer, texts, prompts, options),
            neutral=_neutral(tokenizer, texts, neutral), tokens=options.tokens, batch_size=options.batch_size,
            seed=seed,
        )  # fmt: skip
        ways, modulation = make_ways(model, tokenizer, texts, options, seed)
        made, unsteered = made or modulation, bench.measure(ways[0], 0.0)
        for way in ways:
            if options.stretch or not way.name.startswith(GATES):
                way = stretch(bench, way, options.strengths(), options.budget)
            doses = [bench.measure(way, strength) if strength else unsteered for strength in options.strengths()]
            row = {"way": way.name, "note": way.note, "seed": seed, "unit": way.unit}
            rows.append(row | to_row(doses, options.budget))
            on_row(f"{way.name}, seed {seed}: area {rows[-1]['area']:.3f}")
    assert made is not None
    return {
        "model": source, "positive": str(positive), "negative": str(negative), "method": options.method,
        "judge": judged, "budget": options.budget, "samples": options.samples, "tokens": options.tokens,
        "rows": rows, "areas": summarise(rows), "saved": None, "plot": None,
    }, made  # fmt: skip


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each way's mean area over the seeds, with its 95 % interval (None of one seed)."""
    found = []
    for name in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == name]
        areas = [row["area"] for row in own if not math.isnan(row["area"])]
        found.append({
            "way": name, "note": own[0]["note"], "area": sum(areas) / len(areas) if areas else None,
            "interval": interval(areas), "breaks": sorted({each for row in own for each in row["breaks"]}),
            "spent": all(row["spent"] for row in own),
        })  # fmt: skip
    return found


def _prompts(tokenizer: Any, texts: Texts, given: Sequence[str] | None, options: SteerOptions) -> list[list[int]]:
    """Return the ids of prompts: those that were given, or first words of held-out texts of both classes in turn."""
    if given is None:
        both = [text for pair in zip(*texts.held_out, strict=True) for text in pair]
        given = [" ".join(text.split()[:WORDS]) for text in both]
    found: list[list[int]] = tokenizer(list(given[: options.samples]))["input_ids"]
    return found


def _neutral(tokenizer: Any, texts: Texts, given: Sequence[str] | None) -> list[list[int]]:
    if given is None:
        given = [text for pair in zip(*texts.held_out, strict=True) for text in pair]
    found: list[list[int]] = tokenizer(list(given[:NEUTRAL]), truncation=True, max_length=LONGEST)["input_ids"]
    if not any(len(ids) > 1 for ids in found):
        raise OptionError("neutral texts have a token each, of which there is no perplexity")
    return found
