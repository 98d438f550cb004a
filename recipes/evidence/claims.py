"""What is claimed, and what results say of it: differences with intervals, corrected tests, and a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from hf_glu.training.comparing.statistics import LEVEL, holm, interval, paired_p

SUPPORTED, NOT, OPEN, INTERIM = "supported", "not supported", "not resolvable at this size", "interim: no verdict yet"
POWER, ALPHA = 0.80, 1 - LEVEL
# recall tasks: what choosing among the answers gives
GUESSES = {"flag 16": 1 / 4, "flag 32": 1 / 4, "two hops": 1 / 3, "two hops, asked thrice": 1 / 3}
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a claim is about.

    Attributes:
        key: of a variant's row: a number for each seed.
        lower: whether less is better.
        relative: whether gains are shares of what the other has.
        least: the smallest effect of interest.
        factor, unit, digits: how it is shown.
    """

    key: str = "scores"
    lower: bool = False
    relative: bool = False
    least: float
    factor: float = 1.0
    unit: str
    digits: int


LOSS = Outcome(lower=True, least=0.01, unit="nats", digits=4)
EQUAL_FLOPS = Outcome(key="equal_flops", lower=True, least=0.01, unit="nats", digits=4)
TOKENS = Outcome(key="tokens_to_target", lower=True, relative=True, least=0.1, factor=100, unit="% of tokens", digits=1)
SCORE = Outcome(least=0.005, factor=100, unit="points", digits=2)
RECALL = Outcome(least=0.1, factor=100, unit="points", digits=1)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim that a variant is better than another.

    Attributes:
        name: as in PROTOCOL.md.
        study: whose results it is about.
        better, than: variants; of several names, the better one on the mean.
        outcome: what of.
        margin: by how much better at least (less than 0: by how much it may be worse).
    """

    name: str
    study: str
    better: str
    than: str | tuple[str, ...]
    outcome: Outcome
    margin: float = 0.0

    @property
    def variants(self) -> set[str]:
        """The names of all variants that it is about."""
        return {self.better, self.than} if isinstance(self.than, str) else {self.better, *self.than}

    @property
    def text(self) -> str:
        """The claim in words."""
        others = self.than if isinstance(self.than, str) else f"the better of {' and '.join(self.than)}"
        what = {"nats": "ends at a lower loss than", "% of tokens": "needs fewer tokens to a loss than"}
        verb = what.get(self.outcome.unit, "scores higher than")
        if self.outcome is EQUAL_FLOPS:
            verb = "has at equal FLOPs a lower loss than"
        by = abs(self.margin) * self.outcome.factor
        amount = f"{by:g}{' %' if self.outcome.relative else f' {self.outcome.unit}'}"
        if self.margin < 0:
            return f"`{self.better}` loses less than {amount} to {_code(others)}"
        return f"`{self.better}` {verb} {_code(others)}" + (f", by {amount} at least" if self.margin else "")


def _code(name: str) -> str:
    return name if " and " in name else f"`{name}`"


def _recall(name: str, task: str, better: str, study: str = "memory-recall") -> Claim:
    return Claim(name=name, study=study, better=f"{task}: {better}", than=f"{task}: swiglu", outcome=RECALL)


def _loss(name: str, study: str, better: str, than: str | tuple[str, ...]) -> Claim:
    return Claim(name=name, study=study, better=better, than=than, outcome=LOSS)


def _score(name: str, better: str, than: str, margin: float = 0.0) -> Claim:
    return Claim(name=name, study="conversion-tasks", better=better, than=than, outcome=SCORE, margin=margin)


CLAIMS = (
    _loss("a1", "gates", "swiglu", "gelu"),
    _loss("a2", "gates", "swiglu", "relu2"),
    _loss("a3", "gates", "geglu", "gelu"),
    _loss("a4", "gates", "polynorm", "swiglu"),
    _loss("a5", "gates", "xielu", "gelu"),
    Claim(name="a6", study="gates", better="swiglu", than="gelu", outcome=TOKENS, margin=0.1),
    _loss("b1", "experts", "swiglu top-2", "silu top-2"),
    _loss("b2", "experts", "relu2glu top-2", "relu2 top-2"),
    _loss("b3", "experts", "swiglu top-1", "relu2 top-1"),
    _loss("b4", "experts", "swiglu top-4", "relu2 top-4"),
    _loss("b5", "experts", "kappa_swiglu top-2", "swiglu top-2"),
    _loss("b6", "experts", "mixed top-2", ("relu2 top-2", "swiglu top-2")),
    _score("c1", "geglu", "dense"),
    _score("c2", "swiglu", "dense"),
    _score("c3", "learnable_swiglu", "swiglu"),
    _score("c4", "swiglu:iso healed", "dense", margin=-0.005),
    _score("c5", "experts", "dense"),
    Claim(name="c6", study="conversion-text", better="geglu", than="dense", outcome=EQUAL_FLOPS),
    _recall("d1", "flag 16", "stateful_swiglu"),
    _recall("d2", "flag 32", "stateful_swiglu"),
    _recall("d3", "two hops", "stateful_swiglu"),
    _recall("d4", "two hops", "canon_swiglu"),
    _recall("d5", "two hops", "smear_swiglu"),
    _loss("d6", "memory-text", "stateful_swiglu", "swiglu"),
    _loss("d7", "memory-text", "canon_swiglu", "swiglu"),
    _loss("d8", "memory-text", "smear_swiglu", "swiglu"),
    _recall("d9", "two hops, asked thrice", "stateful_swiglu", "memory-hops"),
    _recall("d10", "two hops, asked thrice", "canon_swiglu", "memory-hops"),
    _recall("d11", "two hops, asked thrice", "smear_swiglu", "memory-hops"),
    _loss("e1", "modulation-text", "modulated_swiglu", "swiglu"),
    Claim(name="e2", study="modulation-tasks", better="modulated_geglu", than="control", outcome=SCORE),
)


def gains(claim: Claim, rows: Mapping[str, Row]) -> list[float] | None:
    """Return by how much the variant is better with each seed; None where a seed has no number."""
    outcome = claim.outcome
    names = [claim.than] if isinstance(claim.than, str) else list(claim.than)
    sign = -1 if outcome.lower else 1
    mine, others = rows[claim.better].get(outcome.key), [rows[name].get(outcome.key) for name in names]
    if not mine or any(not values or None in values for values in (mine, *others)):
        return None
    other = max(others, key=lambda values: sign * fmean(values))
    found = [sign * (a - b) for a, b in zip(mine, other, strict=True)]
    return [gain / b for gain, b in zip(found, other, strict=True)] if outcome.relative else found


def visible(spread: float, count: int) -> float:
    """Return the smallest true effect that a paired test of so many seeds finds with a power of 80 %.

    ``s (t[0.975, n-1] + t[0.80, n-1]) / sqrt(n)``
    """
    from scipy.stats import t

    return float(spread * (t.ppf(1 - ALPHA / 2, count - 1) + t.ppf(POWER, count - 1)) / count**0.5)


def verdict(claim: Claim, bounds: Sequence[float] | None, mean: float, p: float | None) -> str:
    """Return the verdict of PROTOCOL.md.

    Args:
        claim: the claim.
        bounds: the 95 % interval of the gain.
        mean: of the gain.
        p: corrected, of there being no more than the margin; None: all gains are the same number, and there is no test.
    """
    if bounds is None:
        return OPEN
    if p is not None and p < ALPHA:
        return SUPPORTED if mean > claim.margin else NOT
    return NOT if bounds[1] < (claim.margin or claim.outcome.least) else OPEN


def _rates(claim: Claim, rows: Mapping[str, Row]) -> list[float]:
    """Return the learning rates of the variants that a claim is about, the better one's first, where they differ."""
    found = [
        rows[name]["lr"] for name in (claim.better, *sorted(claim.variants - {claim.better})) if rows[name].get("lr")
    ]
    return found if len(set(found)) > 1 else []


def unlearned(result: Mapping[str, Any]) -> list[str]:
    """Return the recall tasks that no variant does better than a guess: of these, claims say little."""
    means = {row["name"]: row.get("mean") for row in result["table"]["variants"]}
    found = {task: [mean for name, mean in means.items() if name.startswith(f"{task}: ")] for task in GUESSES}
    return [task for task, mine in found.items() if mine and all((mean or 0) < GUESSES[task] for mean in mine)]


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a study's results at a size say of each of its claims, as plain data."""
    table, planned = result["table"], result["planned_seeds"]
    rows = {row["name"]: row for row in table["variants"]}
    mine = [claim for claim in CLAIMS if claim.study == result["study"] and claim.variants <= set(rows)]
    found = [gains(claim, rows) for claim in mine]
    raw = [paired_p(gain, [claim.margin] * len(gain)) if gain else None
           for claim, gain in zip(mine, found, strict=True)]  # fmt: skip
    # a claim without a p-value is one of the claims, too: it counts as 1
    corrected = holm(raw, len(raw))
    judged, idle = [], unlearned(result)
    for claim, gain, p in zip(mine, found, corrected, strict=True):
        several = gain is not None and len(gain) > 1
        bounds = interval(gain) if gain else None
        judged.append({
            "claim": claim.name, "learned": not any(claim.better.startswith(f"{task}: ") for task in idle),
            "rates": _rates(claim, rows), "text": claim.text, "size": result["size"], "unit": claim.outcome.unit,
            "factor": claim.outcome.factor, "digits": claim.outcome.digits, "margin": claim.margin,
            "gain": fmean(gain) if gain else None, "interval": bounds, "p_holm": p,
            "visible": visible(stdev(gain), len(gain)) if gain and several else None, "seeds": len(gain or ()),
            "verdict": INTERIM if len(table["seeds"]) < planned else verdict(claim, bounds, fmean(gain or [0]), p),
        })  # fmt: skip
    return judged
