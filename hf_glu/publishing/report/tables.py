"""The tables of a report, from plain data."""

from __future__ import annotations

from collections.abc import Sequence

from hf_glu.publishing.report.collect import Collected, Data, Run, items, mapping, number
from hf_glu.publishing.report.formats import (
    change,
    count,
    duration,
    formatted,
    metric,
    percent,
    short,
    text,
)
from hf_glu.publishing.report.table import Table, TableCell, filled, mark, pairs


def metrics(run: Run) -> Table:
    """Return a run's metrics, before and after training."""
    after, before = mapping(run.outcome.get("metrics")), mapping(run.outcome.get("before"))
    rows: list[list[TableCell]] = [
        [
            key,
            metric(key, before.get(key), [value]),
            metric(key, value, [before.get(key)]),
            mark("score") if key in run.main else None,
        ]
        for key, value in after.items()
    ]
    return filled("Metrics on the validation data", ["metric", "#before training", "#after training", "part of"], rows)


def evaluations(run: Run) -> Table:
    """Return a run's evaluations, in the log's order."""
    names = list(dict.fromkeys(name for line in run.evaluations for name in mapping(line.get("evaluation"))))
    if run.main != names and not run.language:  # else the score is that metric
        names.insert(0, "score")
    rows: list[list[TableCell]] = [
        [
            count(line.get("step")),
            formatted(line.get("epoch"), ".2f"),
            *(
                metric(name, {"score": line.get("score"), **mapping(line.get("evaluation"))}.get(name))
                for name in names
            ),
        ]
        for line in run.evaluations
    ]
    return filled("Evaluations while training", ["#step", "#epoch", *(f"#{name}" for name in names)], rows)


def activations(rows: Sequence[Data]) -> Table:
    """Return the activations' statistics."""
    cells: list[list[TableCell]] = [
        [
            " ".join(filter(None, [text(row.get("stack")), count(row.get("layer"))])),
            text(row.get("activation")),
            count(row.get("width")),
            percent(row.get("open")),
            percent(row.get("sparsity")),
            percent(row.get("dead")),
            formatted(row.get("gate_mean"), ".3f"),
            formatted(row.get("gate_std"), ".3f"),
            text(row.get("site")),
        ]
        for row in rows
    ]
    columns = ["layer", "activation", "#width", "#open", "#sparsity", "#dead", "#gate mean", "#gate std", "site"]
    note = (
        "Open: share of the gates' pre-activations above 0. Sparsity: share of hidden units within 0.1% of the layer's "
        "rms. Dead: share of units that are so on every token. Gate: pre-activation."
    )
    return filled("Activations by layer", columns, cells, note)


def conversion(data: Data) -> Table:
    """Return what a conversion did at each site."""
    rows: list[list[TableCell]] = []
    for site in (sites := items(data.get("sites"))):
        fit, promise = mapping(site.get("fit")), site.get("promise")
        changed = (
            _arrow(form(site.get(f"{key}_before")), form(site.get(f"{key}_after")))
            for key, form in (("width", count), ("parameters", short))
        )
        rows.append(
            [
                text(site.get("site")),
                _arrow(text(site.get("from")), text(site.get("to"))),
                text(site.get("route")),
                mark(str(promise)) if promise else None,
                formatted(site.get("relative_error"), ".1e"),
                _arrow(percent(fit.get("before")), percent(fit.get("after"))),
                *changed,
            ]
        )
    columns = ["site", "activation", "route", "promise", "#relative error", "#held-out error", "#width", "#parameters"]
    notes = sorted({str(site["note"]) for site in sites if site.get("note")})
    if (largest := formatted(data.get("max_abs_difference"), ".1e")) is not None:
        notes.insert(0, f"largest difference of the model's outputs {largest}")
    note = "; ".join(notes)
    return filled("Conversion by site", columns, rows, note[:1].upper() + note[1:] + "." if note else "")


def active_parameters(run: Run) -> float | None:
    """Return how many parameters a token uses; None where that is all of them."""
    about = mapping(run.about.get("parameters"))
    total, active = about.get("total"), about.get("active")
    return None if active == total else number(active)


def costs(run: Run) -> Table:
    """Return what a model costs, before and after its conversion."""
    data = mapping(run.outcome.get("conversion"))
    about = mapping(run.about.get("parameters"))
    total = about.get("total", run.outcome.get("parameters"))
    known = {
        "parameters": (about.get("before", data.get("parameters_before")), total),
        "active parameters a token": (about.get("before"), active_parameters(run)),
        "trainable parameters": (None, about.get("trainable")),
        **{
            name: (data.get(f"{key}_before"), data.get(f"{key}_after"))
            for name, key in (
                ("FFN parameters", "ffn_parameters"),
                ("FFN FLOPs a token", "flops_per_token"),
                ("bytes of weights", "memory_bytes"),
            )
        },
    }
    rows: list[list[TableCell]] = [
        [name, count(before), count(after), change(before, after)]
        for name, (before, after) in known.items()
        if number(after) is not None
    ]
    return filled("Parameters", ["", "#before", "#after", "#change"], rows)


def training(run: Run) -> Table:
    """Return what training took."""
    took, examples = run.training, mapping(run.outcome.get("examples"))
    last = run.steps[-1] if run.steps else {}
    values = {
        "training examples": count(examples.get("train")),
        "validation examples": count(examples.get("validation")),
        "steps": count(took.get("steps", last.get("step"))),
        "epochs": formatted(last.get("epoch"), ".2f"),
        "training time": duration(took.get("seconds")),
        "tokens per second": count(took.get("tokens_per_second", last.get("tokens_per_second"))),
        "training loss": formatted(took.get("loss"), ".4f"),
        "hardware": text(run.about.get("hardware")),
    }
    return pairs("Training and speed", "#value", values)


def setup(run: Run) -> list[Table]:
    """Return the options and versions of a run."""
    found = [("Options", "options"), ("Versions", "versions")]
    tables = [
        pairs(name, "value", {key: text(v) for key, v in mapping(run.about.get(part)).items()}) for name, part in found
    ]
    return [table for table in tables if table.rows]


def tasks(collected: Collected) -> Table:
    """Return a suite's tasks, those without a result marked."""
    rows: list[list[TableCell]] = []
    for name, run in collected.runs.items():
        outcome, took = run.outcome, run.training
        examples = mapping(outcome.get("examples"))
        values = ", ".join(
            f"{key} {shown}" for key, value in mapping(outcome.get("metrics")).items() if (shown := metric(key, value))
        )
        rows.append(
            [
                name,
                mark(run.state),
                metric("score", outcome.get("score")),
                values or None,
                count(examples.get("train")),
                count(examples.get("validation")),
                duration(took.get("seconds")),
                count(took.get("tokens_per_second")),
            ]
        )
    columns = ["task", "state", "#score", "metrics", "#training examples", "#validation examples", "#time", "#tokens/s"]
    return filled("Tasks", columns, rows)


def _arrow(before: str | None, after: str | None) -> str | None:
    """Return ``before → after``, or the one of them that there is."""
    return before if before == after else " → ".join(filter(None, [before, after]))
