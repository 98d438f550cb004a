"""The parts of a report, and those on one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from hf_glu.publishing.report import adaptive, adaptive_tables, curves, experts, plots, tables, watched
from hf_glu.publishing.report.adaptive_rows import by_place
from hf_glu.publishing.report.collect import Data, Run, mapping, number
from hf_glu.publishing.report.drawing import Drawing
from hf_glu.publishing.report.table import Mark, Table, mark

_ADAPTIVE = "Activations that were trained"
_OPEN = 4  # more kinds of activations than this are folded
_SHARES = (
    ("open", "Open gates", "Share of pre-activations above 0."),
    ("sparsity", "Sparsity", "Share of hidden units within 0.1% of the layer's rms."),
    ("dead", "Dead units", "Share of units within 0.1% of the layer's rms on every token."),
)


class KeyFigure(NamedTuple):
    """A number that is shown large."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page: figures, tables and parts of its own.

    Attributes:
        title: its heading.
        figures, tables, parts: what it holds.
        folded: whether the reader opens it.
        state: how what it tells of stands.
    """

    title: str
    figures: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    parts: Sequence[Section] = ()
    folded: bool = False
    state: Mark | None = None

    def drawings(self) -> list[Drawing]:
        """Return the figures, those of its parts among them."""
        return [*self.figures, *(drawing for part in self.parts for drawing in part.drawings())]


@dataclass(frozen=True, kw_only=True)
class Page:
    """The page of a report.

    Attributes:
        kind: what it is a report of.
        title: its heading.
        facts: what was run, in short.
        state: how it stands.
        key_figures, sections: what it holds.
    """

    kind: str
    title: str
    facts: Sequence[str]
    state: Mark
    key_figures: Sequence[KeyFigure]
    sections: Sequence[Section]


def section(title: str, figures: Sequence[Drawing | None], found: Sequence[Table], *, folded: bool = False) -> Section:
    """Make a section of the figures and tables that aren't empty."""
    drawn = [figure for figure in figures if figure is not None]
    return Section(title=title, figures=drawn, tables=[table for table in found if table.rows], folded=folded)


def sections_of(run: Run, prefix: str = "") -> list[Section]:
    """Make the sections on one run that there are data for; its figures' names begin with ``prefix``."""
    made = [
        section("Training and results", _curves(run, prefix), [tables.metrics(run), tables.evaluations(run)]),
        section("Activations", _activations(run.activations, prefix), [tables.activations(run.activations)]),
        _adaptive(run.adaptive, f"{prefix} adaptive"),
        section("Experts", experts.heat_maps(f"{prefix} experts", run.experts), experts.loads(run.experts)),
        section("While training", watched.figures(f"{prefix} watched", run.steps), [watched.events(run.steps)]),
        section("Conversion", [], [tables.conversion(mapping(run.outcome.get("conversion")))]),
        section("Parameters and speed", [], [tables.costs(run), tables.training(run)]),
    ]
    return kept(made)


def kept(made: Sequence[Section]) -> list[Section]:
    """Return the sections that hold anything."""
    return [each for each in made if each.figures or each.tables or each.parts]


def each_run(runs: Sequence[tuple[str, Run]]) -> list[Section]:
    """Return the sections on each run, folded."""
    made = [Section(title=name, parts=sections_of(run, name), folded=True, state=mark(run.state)) for name, run in runs]
    return kept(made)


def setup(run: Run | None) -> Section:
    """Return the options and versions of a run."""
    return section("Options and versions", [], tables.setup(run) if run else [], folded=True)


def by_layer(rows: Sequence[Data], column: str) -> curves.Points:
    """Return a column of the activations' statistics by layer, or by site where layers have several."""
    layers = [number(row.get("layer")) for row in rows]
    single = None not in layers and len(set(layers)) == len(layers)
    named = [
        {**row, "place": layer if single else place}
        for place, (row, layer) in enumerate(zip(rows, layers, strict=True))
    ]
    return curves.points(named, "place", column)


def score_before(run: Run) -> float | None:
    """Return the score before training: the mean of the metrics that make it up."""
    before = mapping(run.outcome.get("before"))
    values = [value for name in run.main if (value := number(before.get(name))) is not None]
    return fmean(values) if values and len(values) == len(run.main) else None


def _adaptive(rows: Sequence[Data], prefix: str) -> Section:
    """Make the section on trained activations, with a part for each kind if there are several."""
    places = by_place(rows)
    parts = [
        section(
            place.capitalize(),
            adaptive.figures(f"{prefix} {at or ''}", found),
            adaptive_tables.tables(found),
            folded=len(places) > _OPEN,
        )
        for at, (place, found) in enumerate(places.items())
    ]
    found = kept(parts)
    if len(found) != 1:
        return Section(title=_ADAPTIVE, parts=found)
    return Section(title=_ADAPTIVE, figures=found[0].figures, tables=found[0].tables)


def _curves(run: Run, prefix: str) -> list[Drawing | None]:
    loss, scores = curves.points(run.steps, "step", "loss"), curves.points(run.evaluations, "step", "score")
    label = " and ".join(run.main) or "score"
    title = "Loss on the validation text" if run.language else "Score on the validation data"
    return [
        curves.loss_curve(f"{prefix} loss", loss),
        curves.score_curve(f"{prefix} score", scores, label, score_before(run), title=title),
    ]


def _activations(rows: Sequence[Data], prefix: str) -> list[Drawing | None]:
    stacks: dict[str, list[Data]] = {}
    for row in rows:
        stacks.setdefault(str(row.get("stack") or ""), []).append(row)
    shares = [
        plots.layer_shares(
            f"{prefix} {key}", title, {stack: by_layer(part, key) for stack, part in stacks.items()}, note=note
        )
        for key, title, note in _SHARES
    ]
    gates = {stack: (by_layer(part, "gate_mean"), by_layer(part, "gate_std")) for stack, part in stacks.items()}
    return [*shares, plots.gate_inputs(f"{prefix} gates", gates)]
