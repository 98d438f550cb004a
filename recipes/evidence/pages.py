"""The pages of the evidence, made of its results alone: one HTML page with figures, and one of the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_glu.checkpoint.writing import write_text
from hf_glu.publishing.report import curves
from hf_glu.publishing.report.drawing import INK, MUTED, SERIES, Drawing, draw, name_axes
from hf_glu.publishing.report.page import write_page
from hf_glu.publishing.report.sections import KeyFigure, Page, Section, kept, section
from hf_glu.publishing.report.table import Table, mark
from recipes.evidence.claims import CLAIMS, INTERIM, NOT, OPEN, SUPPORTED, judge
from recipes.evidence.document import DOCUMENT, compose
from recipes.evidence.showing import RESULTS, TITLES, Data, bounds, rate, read_results, shown, value_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        [row["name"], value_of(row["mean"], percent), rate(row), f"{int(row['parameters']):,}",
         f"{row['active_parameters']:,}" if "active_parameters" in row else None,
         ", ".join(value_of(score, percent) for score in row["scores"])]
        for row in table["variants"]
    ]  # fmt: skip
    return Table(
        caption=f"Variants, {len(table['seeds'])} of {result['planned_seeds']} seeds", columns=columns, rows=rows
    )


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


def write_pages(folder: Path, document_path: Path | None = None, results: Path = RESULTS) -> Path:
    """Write ``evidence.html`` to a folder, and the documentation's page; return the path of the former.

    Raises:
        MissingPackageError: matplotlib or Jinja2 isn't installed.
    """
    found = read_results(results)
    folder.mkdir(parents=True, exist_ok=True)
    page = write_page(make_page(found), folder / "evidence.html", command="")
    write_text(document_path or DOCUMENT, compose(found))
    return page
