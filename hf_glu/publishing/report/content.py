"""Composing the reports of a run, a suite and a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from hf_glu.publishing.report import curves, plots, tables
from hf_glu.publishing.report.collect import (
    COMPARISON,
    RUN,
    SUITE,
    Collected,
    Data,
    Run,
    mapping,
    number,
)
from hf_glu.publishing.report.compared import comparison_page
from hf_glu.publishing.report.formats import (
    change,
    count,
    duration,
    formatted,
    metric,
    short,
    text,
)
from hf_glu.publishing.report.sections import (
    KeyFigure,
    Page,
    Section,
    each_run,
    kept,
    score_before,
    section,
    sections_of,
    setup,
)
from hf_glu.publishing.report.table import mark
from hf_glu.publishing.training import OBJECTIVES

_SHOWN = ("seed", "epochs", "batch_size", "lr")  # options in the header


def make_page(collected: Collected) -> Page:
    """Compose the report of what was collected."""
    return {RUN: _run, SUITE: _suite, COMPARISON: comparison_page}[collected.kind](collected)


def _run(collected: Collected) -> Page:
    (run,) = collected.runs.values()
    return Page(
        kind="Language model" if run.language else "Fine-tuning run",
        title=f"{run.about.get('model') or run.name} on {run.material}",
        facts=_facts(run),
        state=mark(run.state),
        key_figures=[*_score(run), *_costs(run)],
        sections=kept([*sections_of(run), setup(run)]),
    )


def _suite(collected: Collected) -> Page:
    index, runs = collected.index, collected.runs
    first = next((run for run in runs.values() if run.about), None)
    partial = bool(index.get("partial")) or any(run.state != "finished" for run in runs.values())
    about = {**(first.about if first else {}), **index}
    progress = {key: [curves.points(run.evaluations, "epoch", "score")] for key, run in runs.items()}
    drawn = [
        plots.task_scores("scores", {key: number(run.outcome.get("score")) for key, run in runs.items()}),
        curves.overlay("progress", "Scores while training", progress, x="epoch", y="score"),
    ]
    return Page(
        kind="Suite",
        title=f"{about.get('model') or 'A model'} on {index.get('suite') or 'a suite'}",
        facts=_facts(first, about.get("activation")),
        state=mark("partial" if partial else "finished"),
        key_figures=_suite_figures(index, runs, partial),
        sections=kept(
            [
                section("Tasks", drawn, [tables.tasks(collected)]),
                Section(title="Each task", parts=each_run(list(runs.items()))),
                setup(first),
            ]
        ),
    )


def _suite_figures(index: Data, runs: dict[str, Run], partial: bool) -> list[KeyFigure]:
    done = [run for run in runs.values() if run.results is not None]
    of_all = f"mean of {len(done)} of {len(runs)} tasks: partial" if partial else f"mean of {len(done)} tasks"
    seconds = [value for run in done if (value := number(run.training.get("seconds"))) is not None]
    found = [
        ("score", metric("score", index.get("score")), of_all),
        ("tasks finished", f"{len(done)} of {len(runs)}", ""),
        ("training time", duration(sum(seconds)) if seconds else None, "all tasks together"),
    ]
    return [*_known(found), *(_costs(done[0])[:1] if done else [])]


def _facts(run: Run | None, activation: object = None) -> list[str]:
    about = run.about if run else {}
    name, options = activation or about.get("activation"), mapping(about.get("options"))
    facts = [f"activation {text(name)}" if name else "activation as pretrained"]
    if run and run.language:
        facts.insert(0, OBJECTIVES.get(run.task, run.task))
    facts += [f"{key.replace('_', ' ')} {text(options[key])}" for key in _SHOWN if key in options]
    return [*facts, *([str(about["hardware"])] if about.get("hardware") else [])]


def _score(run: Run) -> list[KeyFigure]:
    name = " and ".join(run.main) or "score"
    if run.results is None:
        last = next((line for line in reversed(run.evaluations) if number(line.get("score")) is not None), {})
        return _known([("score so far", metric(name, last.get("score")), _with("at step", count(last.get("step"))))])
    before = score_before(run)
    note = "" if before is None else f"{metric(name, before)} before training"
    title = "score" if len(run.main) != 1 else run.main[0].replace("_", " ")
    if run.language:
        note = ", ".join(filter(None, [note, _perplexity(run)]))
    return _known([(title, metric(name, run.outcome.get("score"), [before]), note)])


def _perplexity(run: Run) -> str:
    value = metric("perplexity", mapping(run.outcome.get("metrics")).get("perplexity"))
    return _with("perplexity", value)


def _costs(run: Run) -> list[KeyFigure]:
    about = mapping(run.about.get("parameters"))
    total, before = about.get("total", run.outcome.get("parameters")), about.get("before")
    last = run.steps[-1] if run.steps else {}
    steps = run.training.get("steps", last.get("step"))
    speed = run.training.get("tokens_per_second", last.get("tokens_per_second"))
    grown, active = change(before, total), short(tables.active_parameters(run))
    notes = [f"{grown} by the conversion" if grown and before != total else "", f"{active} a token" if active else ""]
    return _known(
        [
            ("parameters", short(total), ", ".join(filter(None, notes))),
            ("training time", duration(run.training.get("seconds")), _with(count(steps), "steps")),
            ("steps so far", count(steps) if run.results is None else None, ""),
            ("tokens per second", count(speed), ""),
            ("training loss", formatted(run.training.get("loss"), ".4f"), "at the end"),
        ]
    )


def _with(*words: str | None) -> str:
    """Join words; the text is empty if one of them isn't known."""
    return " ".join(map(str, words)) if None not in words else ""


def _known(figures: Sequence[tuple[str, str | None, str]]) -> list[KeyFigure]:
    return [KeyFigure(label, value, note) for label, value, note in figures if value is not None]
