"""The documentation's page of the evidence, in Markdown, made of the results alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from recipes.evidence.claims import CLAIMS, GUESSES, INTERIM, NOT, OPEN, SUPPORTED, judge, unlearned
from recipes.evidence.presets import PRESETS
from recipes.evidence.showing import NOT_RUN, TITLES, Data, bounds, rate, shown, value_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "results" / "evidence.md"
_HEAD = """# The evidence

What gates, experts, memory and modulation bring at a size that two cores can train, with paired seeds. Claims, tests
and rules of a verdict were [written down]({protocol}) before the first run. This page is made of the results' files
(`python -m recipes.evidence page`); a claim that no study was run for is *{not_run}*.

```
python -m recipes.evidence fetch DATA
python -m recipes.evidence run gates --preset cpu --size 0.3m --workers 2 --data DATA --output runs/evidence
```

Studies: {studies}. A study that was stopped goes on where it was; `--workers` carries out so many runs at once,
each in one thread. `--preset h200` has sizes of 10 and 60 M for
one GPU; nothing here was run on one.
"""
PROTOCOL = "../../recipes/evidence/PROTOCOL.md"
MEANINGS = {
    SUPPORTED: "it is so, and no accident of these seeds",
    NOT: "it is the other way round, or the effect is less than would matter to a user",
    OPEN: "these seeds tell neither an effect that would matter from none",
    INTERIM: "fewer seeds than planned",
}


def compose(results: Sequence[Data]) -> str:
    """Return the page of the documentation, in Markdown."""
    judged = {(result["study"], result["size"]): judge(result) for result in results}
    studies = ", ".join(f"`{study}`" for study in TITLES)
    parts = [_HEAD.format(protocol=PROTOCOL, not_run=NOT_RUN, studies=studies), summary(judged)]
    for result in results:
        parts.append(_study(result, judged[result["study"], result["size"]]))
    return "\n".join(parts)


def summary(judged: Mapping[tuple[str, str], Sequence[Data]]) -> str:
    """Return the list of all claims with their verdicts."""
    lines = ["## Summary", "", "| claim | | size | verdict | gain, 95 % interval |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        mine = [each for some in judged.values() for each in some if each["claim"] == claim.name]
        lines += [
            f"| {each['claim']} | {each['text']} | {each['size']} | {each['verdict']} | "
            f"{shown(each, 'gain')} ({bounds(each)}) {each['unit']} |"
            for each in mine
        ] or [f"| {claim.name} | {claim.text} | - | {NOT_RUN} | - |"]
    return "\n".join([*lines, "", *in_words([each for some in judged.values() for each in some]), ""])


def in_words(judged: Sequence[Data]) -> list[str]:
    """Return what was found in plain words: under each verdict its claims, with the sizes."""
    lines = ["In plain words:", ""]
    for verdict, meaning in MEANINGS.items():
        sizes: dict[str, list[str]] = {}
        for each in judged:
            if each["verdict"] == verdict:
                name = f"{each['claim']}, {each['text']}" if verdict in (SUPPORTED, NOT) else each["claim"]
                notes = "" if each["learned"] else ", where nobody learns it"
                notes += ", at learning rates that differ" if each["rates"] else ""
                sizes.setdefault(name, []).append(each["size"] + notes)
        if sizes:
            found = "; ".join(f"{name} ({' and '.join(where)})" for name, where in sizes.items())
            lines.append(f"- **{verdict}**, {meaning}: {found}.")
    known = {each["claim"] for each in judged}
    if left := [claim.name for claim in CLAIMS if claim.name not in known]:
        lines.append(f"- **{NOT_RUN}**: {', '.join(left)}.")
    return lines


def _study(result: Data, judged: Sequence[Data]) -> str:
    table, percent = result["table"], result["table"]["metric"] != "loss"
    seeds = f"{len(table['seeds'])} of {result['planned_seeds']} seeds{_tokens(result)}"
    lines = [
        f"## {TITLES[result['study']]}, {result['size']}", "",
        f"{seeds}, on {result['hardware']}, written {result['written'][:10]}.", "",
        f"| variant | {table['metric']} | learning rate | parameters |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in table["variants"]:
        edge = f" (the {at_end(row)} tried)" if at_end(row) else ""
        parameters, value = f"{int(row['parameters']):,}", value_of(row["mean"], percent)
        if lost := sum(score is None for score in row["scores"]):
            value += "" if row["mean"] is None else f" ({lost} of {len(row['scores'])} seeds diverged)"
        lines.append(f"| {row['name']} | {value} | {rate(row)}{edge} | {parameters} |")
    lines += ["", *_at_ends(table["variants"]), *(sentence(each) for each in judged), ""]
    for task in unlearned(result):
        guess = f"{GUESSES[task]:.0%}".replace("%", " %")
        lines += [f"No variant is above a guess ({guess}) in {task}: of models that learn it, this says nothing.", ""]
    lines += _divided(table["variants"])
    return "\n".join(lines)


def _tokens(result: Data) -> str:
    """Return how many tokens a language model is trained on, and how many that is for each of its parameters."""
    preset = PRESETS.get(result["preset"])
    size = preset.sizes.get(result["size"]) if preset else None
    if size is None:
        return ""
    each = size.tokens / result["table"]["variants"][0]["parameters"]
    return f", {size.tokens:,} tokens a run ({each:.1f} for each parameter)"


def at_end(row: Data) -> str:
    """Return at which end of the learning rates that were tried a variant's is: ``highest``, ``lowest`` or neither."""
    rates = [float(rate) for rate in row.get("rates", {})]
    ends = {max(rates): "highest", min(rates): "lowest"} if rates else {}
    return ends.get(row.get("lr", 0.0), "")


def _at_ends(variants: Sequence[Data]) -> list[str]:
    """Return a warning where learning rates are at an end of those that were tried, chosen on one seed each."""
    ends = sum(bool(at_end(row)) for row in variants)
    if not ends:
        return []
    return [
        f"The learning rates of {ends} of {len(variants)} variants are at an end of those that were tried; others may",
        "be better. Each was chosen on one seed: a difference of two variants holds that choice, too.", "",
    ]  # fmt: skip


def _divided(variants: Sequence[Data]) -> list[str]:
    """Return the table of how far experts divide newsgroups among them, where that was measured."""
    some = [row for row in variants if row.get("newsgroups")]
    if not some:
        return []
    lines = [
        "Normalised mutual information of expert and newsgroup, in thousandths, above what chance gives (described,",
        "not tested; the mean of the seeds, and their least and most):", "",
        "| variant | above chance | least | most |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in some:
        values = [1000 * each["above chance"] for each in row["newsgroups"]]
        lines.append(f"| {row['name']} | {fmean(values):.1f} | {min(values):.1f} | {max(values):.1f} |")
    return [*lines, ""]


def sentence(each: Data) -> str:
    """Return what was found of a claim, in words."""
    if each["gain"] is None:
        return f"- {each['claim']}, {each['text']}: {each['verdict']}; not every seed has a number."
    seen = "" if each["visible"] is None else f"; so many seeds see {shown(each, 'visible', '')}"
    p = "" if each["p_holm"] is None else f", p {each['p_holm']:.3f}"
    gain = f"{shown(each, 'gain')} {each['unit']} ({bounds(each)}{p})"
    rates = f"; at learning rates of {' and '.join(f'{rate:g}' for rate in each['rates'])}" if each["rates"] else ""
    return f"- {each['claim']}, {each['text']}: **{each['verdict']}**; {gain}{seen}{rates}."
