"""Measuring a way of steering: what the model writes, its score, and perplexities.

Shapes: N texts, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import Tensor

from hf_glu.bench.steering.curves import Dose
from hf_glu.bench.steering.judging import Judge
from hf_glu.bench.steering.ways import PROMPT, SteeringWay
from hf_glu.instruments.perplexity import next_token_perplexity
from hf_glu.instruments.probe import evaluating, same_randomness
from hf_glu.instruments.steering.contrast import padded, padding_id

MOST_UNIT = 64.0
TEMPERATURE, TOP_K = 0.7, 50
Ids = list[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class SteeringBench:
    """What all ways of steering are measured on.

    Attributes:
        model, tokenizer: the model, and its tokenizer.
        judge: scores what is written.
        prompts: what is gone on with.
        neutral: neutral texts.
        tokens: how many are written.
        batch_size: texts of one forward pass.
        seed: of what is drawn, the same at each strength.
    """

    model: Any
    tokenizer: Any
    judge: Judge
    prompts: Sequence[Ids]
    neutral: Sequence[Ids]
    tokens: int
    batch_size: int
    seed: int

    def measure(self, way: SteeringWay, strength: float) -> Dose:
        """Return what a way gives at one strength, before its unit."""
        neutral = self.neutral_perplexity(way, strength)
        if not math.isfinite(neutral):
            return Dose(strength=strength, score=math.nan, own=math.inf, neutral=neutral)
        written = self.write(way, strength)
        own = self.perplexity([[*prompt, *text] for prompt, text in zip(self.prompts, written, strict=True)],
                              [len(prompt) for prompt in self.prompts])  # fmt: skip
        score = fmean(self.judge.scores(written))
        example = self.tokenizer.decode([*self.prompts[0], *written[0]], skip_special_tokens=True)
        return Dose(strength=strength, score=score, own=own, neutral=neutral, example=example)

    def neutral_perplexity(self, way: SteeringWay, strength: float) -> float:
        """Return the steered model's perplexity on neutral text."""
        prefix = way.prefix(strength)
        given = [self.behind(prefix, ids) for ids in self.neutral]
        with way.on(strength * way.unit):  # a text's first token never counts, as without a prefix
            return self.perplexity(given, [len(prefix) + 1] * len(given))

    def behind(self, prefix: Ids, ids: Ids) -> Ids:
        """Return a text's tokens with others before them: behind the token that begins a text, where there is one."""
        begins = int(ids[:1] == [self.tokenizer.bos_token_id])
        return [*ids[:begins], *prefix, *ids[begins:]]

    def write(self, way: SteeringWay, strength: float) -> list[Ids]:
        """Return what the steered model goes on with after each prompt."""
        prefix, found = way.prefix(strength), list[Ids]()
        given = [self.behind(prefix, prompt) for prompt in self.prompts]
        with evaluating(self.model), same_randomness(self.model, seed=self.seed), way.on(strength * way.unit):
            for begin in range(0, len(given), self.batch_size):
                found += self._generate(given[begin : begin + self.batch_size])
        return found

    def _generate(self, given: Sequence[Ids]) -> list[Ids]:
        ids, mask = self._padded(given, left=True)
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=self.tokens, min_new_tokens=self.tokens, do_sample=True,
            temperature=TEMPERATURE, top_k=TOP_K, top_p=1.0, num_beams=1, remove_invalid_values=True, pad_token_id=0,
        )  # fmt: skip
        texts: list[Ids] = out[:, ids.shape[1] :].tolist()
        return texts

    def perplexity(self, texts: Sequence[Ids], skipped: Sequence[int]) -> float:
        """Return exp of the mean -log p of tokens, of each text those after the first ``skipped``; inf of NaN."""
        parts = (self._padded(texts[at : at + self.batch_size]) for at in range(0, len(texts), self.batch_size))
        given = ({"input_ids": ids, "attention_mask": mask} for ids, mask in parts)
        return next_token_perplexity(self.model, given, skipped=skipped)[0]

    def _padded(self, texts: Sequence[Ids], *, left: bool = False) -> tuple[Tensor, Tensor]:
        device, fill = next(self.model.parameters()).device, padding_id(self.model.config)
        return padded(texts, device, fill=fill, left=left)


def stretch(bench: SteeringBench, way: SteeringWay, strengths: Sequence[float], budget: float) -> SteeringWay:
    """Return a way with the smallest unit, a power of 2, at which its largest strengths spend the whole budget."""
    if way.name == PROMPT:
        return way
    base = bench.neutral_perplexity(way, 0.0)
    while way.unit < MOST_UNIT:
        costs = [
            bench.neutral_perplexity(way, strength) / base for strength in (strengths[0], strengths[-1]) if strength
        ]
        if all(not math.isfinite(cost) or cost >= budget for cost in costs):
            break
        way = way.stretched(2 * way.unit)
    return way
