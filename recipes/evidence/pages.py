"""The pages of the evidence, made of its results alone: one HTML page with figures, and one of the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hf_glu.checkpoint.jsonio import read_object
from hf_glu.checkpoint.writing import write_text
from hf_glu.errors import DataError
from hf_glu.publishing.report import curves
from hf_glu.publishing.report.drawing import INK, MUTED, SERIES, Drawing, draw, name_axes
from hf_glu.publishing.report.page import write_page
from hf_glu.publishing.report.sections import KeyFigure, Page, Section, kept, section
from hf_glu.publishing.report.table import Table, mark
from recipes.evidence.claims import CLAIMS, GUESSES, INTERIM, NOT, OPEN, SUPPORTED, judge, unlearned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Data = dict[str, Any]
RESULTS = Path(__file__).with_name("results")
DOCUMENT = Path(__file__).parents[2] / "docs" / "results" / "evidence.md"
NOT_RUN = "not run yet"
TITLES = {
    "gates": "(a) Which gate, from scratch",
    "experts": "(b) Is the inner gate redundant in experts",
    "conversion-tasks": "(c) After conversion: tasks",
    "conversion-text": "(c) After conversion: pretraining goes on",
    "memory-recall": "(d) Memory: recall",
    "memory-hops": "(d) Memory: two hops, asked thrice",
    "memory-text": "(d) Memory: text",
    "modulation-text": "(e) Modulation: text of four domains",
    "modulation-tasks": "(e) Modulation: all tasks at once",
}
_HEAD = """# The evidence

What gates, experts, memory and modulation bring at a size that two cores can train, with paired seeds. Claims, tests
and rules of a verdict were [written down]({protocol}) before the first run. This page is made of the results' files
(`python -m recipes.evidence page`); a claim that no study was run for is *{not_run}*.

```
python -m recipes.evidence fetch DATA
python -m recipes.evidence run gates --preset cpu --size 0.3m --data DATA --output runs/evidence
```

Studies: {studies}. A study that was stopped goes on where it was. `--preset h200` has sizes of 10 and 60 M for
one GPU; nothing here was run on one.
"""
PROTOCOL = "../../recipes/evidence/PROTOCOL.md"


def read_results(folder: Path = RESULTS) -> list[Data]:
    """Read the results of all studies, in the order of the claims, the small sizes first.

    Raises:
        DataError: one is of a study that there isn't.
    """
    found = [read_object(path) for path in sorted(folder.glob("*.json"))]
    if unknown := [each["study"] for each in found if each["study"] not in TITLES]:
        raise DataError(f"{folder} has results of {unknown[0]!r}, which is no study")
    return sorted(found, key=lambda each: (list(TITLES).index(each["study"]), _millions(each["size"])))


def _millions(size: str) -> float:
    return float(size[:-1]) if size.endswith("m") and size[:-1].replace(".", "").isdigit() else 0.0


def shown(each: Data, key: str, sign: str = "+") -> str:
    """Return a number of a judged claim as it is shown."""
    value = each[key]
    return "-" if value is None else f"{value * each['factor']:{sign}.{each['digits']}f}"


def bounds(each: Data) -> str:
    """Return the interval of a judged claim as it is shown."""
    if each["interval"] is None:
        return "-"
    return " to ".join(f"{value * each['factor']:+.{each['digits']}f}" for value in each["interval"])


def claims_table(judged: Sequence[Data]) -> Table:
    """Return the claims with what was found."""
    columns = (
        "claim",
        "in words",
        "size",
        "#gain",
        "#95 % interval",
        "unit",
        "#p (Holm)",
        "#smallest visible",
        "verdict",
    )
    rows: list[list[Any]] = [
        [each["claim"], each["text"].replace("`", ""), each["size"], shown(each, "gain"), bounds(each), each["unit"],
         "-" if each["p_holm"] is None else f"{each['p_holm']:.3f}", shown(each, "visible", ""), each["verdict"]]
        for each in judged
    ]  # fmt: skip
    note = "Gain: by how much the first is better. Smallest visible: a true effect that so many seeds find at 80 %."
    return Table(caption="Claims", columns=columns, rows=rows, note=note)


def variants_table(result: Data) -> Table:
    """Return the variants of a study."""
    table = result["table"]
    percent = table["metric"] != "loss"
    columns = ("variant", f"#{table['metric']}", "#lr", "#parameters", "#active", "single seeds")
    rows: list[list[Any]] = [
        [row["name"], _value(row["mean"], percent), _rate(row), f"{int(row['parameters']):,}",
         f"{row['active_parameters']:,}" if "active_parameters" in row else None,
         ", ".join(_value(score, percent) for score in row["scores"])]
        for row in table["variants"]
    ]  # fmt: skip
    return Table(
        caption=f"Variants, {len(table['seeds'])} of {result['planned_seeds']} seeds", columns=columns, rows=rows
    )


def _rate(row: Data) -> str:
    return "-" if row.get("lr") is None else f"{row['lr']:g}"


def _value(value: float | None, percent: bool) -> str:
    if value is None:
        return "diverged"
    return f"{value:.1%}" if percent else f"{value:.4f}"


def forest(name: str, judged: Sequence[Data]) -> Drawing | None:
    """Draw the gains with their intervals, one line for each claim; the dashed lines are the smallest of interest."""
    rows = [each for each in judged if each["interval"] is not None]
    if not rows:
        return None
    least = {claim.name: claim.outcome.least for claim in CLAIMS}

    def paint(axes: Axes) -> None:
        for at, each in enumerate(reversed(rows)):
            low, high = (value / least[each["claim"]] for value in each["interval"])
            colour = SERIES[0] if each["verdict"] == SUPPORTED else MUTED
            axes.plot([low, high], [at, at], color=colour, lw=2)
            axes.plot([each["gain"] / least[each["claim"]]], [at], marker="o", color=colour)
        axes.axvline(0, color=INK, lw=0.8)
        for edge in (-1, 1):
            axes.axvline(edge, color=MUTED, lw=0.8, ls=(0, (4, 3)))
        axes.set_yticks(range(len(rows)), [f"{each['claim']} {each['size']}" for each in reversed(rows)])
        name_axes(axes, "gain, in smallest effects of interest", "")

    alt = "; ".join(f"{each['claim']} {each['size']}: {bounds(each)} {each['unit']}" for each in rows)
    return draw(name, "Gains with 95 % intervals", paint, alt=alt, height=90 + 26 * len(rows))


def study_section(result: Data, judged: Sequence[Data]) -> Section:
    """Return what a study at a size gave."""
    title = f"{TITLES[result['study']]}, {result['size']}"
    name = f"{result['study']}-{result['size']}"
    lines = {
        row["name"]: [[tuple(point) for point in row["curve"]]]
        for row in result["table"]["variants"]
        if row.get("curve")
    }
    drawn = curves.overlay(f"curves-{name}", "Loss on the validation text", lines, x="tokens", y="loss", plain=".3f")
    return section(title, [forest(f"forest-{name}", judged), drawn], [claims_table(judged), variants_table(result)])


def make_page(results: Sequence[Data]) -> Page:
    """Compose the HTML page."""
    judged = [judge(result) for result in results]
    every = [each for some in judged for each in some]
    counts = {word: sum(each["verdict"] == word for each in every) for word in (SUPPORTED, NOT, OPEN, INTERIM)}
    return Page(
        kind="Evidence", title="What gates, experts, memory and modulation bring",
        facts=[f"{len(results)} results", f"{len(CLAIMS)} claims"], state=mark("finished"),
        key_figures=[KeyFigure(word, str(number)) for word, number in counts.items()],
        sections=kept([
            section("All claims", [forest("forest", every)], [claims_table(every)]),
            *(study_section(result, some) for result, some in zip(results, judged, strict=True)),
        ]),
    )  # fmt: skip


def document(results: Sequence[Data]) -> str:
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
    return "\n".join([*lines, ""])


def _study(result: Data, judged: Sequence[Data]) -> str:
    table, percent = result["table"], result["table"]["metric"] != "loss"
    seeds = f"{len(table['seeds'])} of {result['planned_seeds']} seeds"
    lines = [
        f"## {TITLES[result['study']]}, {result['size']}", "",
        f"{seeds}, on {result['hardware']}, written {result['written'][:10]}.", "",
        f"| variant | {table['metric']} | learning rate | parameters |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in table["variants"]:
        rates = {float(rate) for rate in row.get("rates", {})}
        edge = " (the highest tried)" if rates and row["lr"] == max(rates) else ""
        edge = " (the lowest tried)" if rates and row["lr"] == min(rates) else edge
        parameters, value = f"{int(row['parameters']):,}", _value(row["mean"], percent)
        if lost := sum(score is None for score in row["scores"]):
            value += "" if row["mean"] is None else f" ({lost} of {len(row['scores'])} seeds diverged)"
        lines.append(f"| {row['name']} | {value} | {_rate(row)}{edge} | {parameters} |")
    lines += ["", *(sentence(each) for each in judged), ""]
    for task in unlearned(result):
        guess = f"{GUESSES[task]:.0%}".replace("%", " %")
        lines += [f"No variant is above a guess ({guess}) in {task}: of models that learn it, this says nothing.", ""]
    lines += _divided(table["variants"])
    return "\n".join(lines)


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
    return f"- {each['claim']}, {each['text']}: **{each['verdict']}**; {gain}{seen}."


def write_pages(folder: Path, document_path: Path | None = None, results: Path = RESULTS) -> Path:
    """Write ``evidence.html`` to a folder, and the documentation's page; return the path of the former.

    Raises:
        MissingPackageError: matplotlib or Jinja2 isn't installed.
    """
    found = read_results(results)
    folder.mkdir(parents=True, exist_ok=True)
    page = write_page(make_page(found), folder / "evidence.html", command="")
    write_text(document_path or DOCUMENT, document(found))
    return page
