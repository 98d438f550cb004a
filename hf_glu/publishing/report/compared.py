"""The report of a comparison: its variants' scores or losses, tests, costs and curves."""

from __future__ import annotations

from collections.abc import Sequence

from hf_glu.publishing.report import curves, plots
from hf_glu.publishing.report.collect import Collected, Data, Run, items, mapping, number, numbers
from hf_glu.publishing.report.drawing import Drawing
from hf_glu.publishing.report.formats import (
    count,
    duration,
    formatted,
    half_width,
    is_fraction,
    is_number,
    metric,
    p_value,
)
from hf_glu.publishing.report.sections import KeyFigure, Page, Section, by_layer, each_run, kept, section, setup
from hf_glu.publishing.report.table import Table, TableCell, filled, mark
from hf_glu.publishing.training import OBJECTIVES, texts

_TOKENS = ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)"), (1.0, ""))
_EACH = "Bold: mean of the seeds"


def comparison_page(collected: Collected) -> Page:
    """Compose the report of a comparison."""
    index, runs = collected.index, collected.runs
    label, baseline = str(index.get("metric") or "score"), str(index.get("baseline") or "")
    variants, seeds = items(index.get("variants")), numbers(index.get("seeds"))
    names = [str(variant.get("name")) for variant in variants]
    places = {name: name.replace(":", "-") for name in names}  # swiglu:iso is in the folders swiglu-iso-seed0, ...
    by_name = {
        name: [runs[key] for seed in seeds if (key := f"{place}-seed{seed}") in runs] for name, place in places.items()
    }
    firsts = [(name, found[0]) for name, found in by_name.items() if found]
    unfinished = any(run.state != "finished" for run in runs.values())
    facts = [f"{len(variants)} variants", f"{len(seeds)} seeds each"]
    if objective := index.get("objective"):
        facts.insert(0, OBJECTIVES.get(str(objective), str(objective)))
    material = texts(index.get("data")) if objective else index.get("task") or "a task"
    figures = [plots.comparison("comparison", variants, label, baseline), *_overlays(by_name, index)]
    return Page(
        kind="Comparison",
        title=f"{index.get('model') or 'A model'} on {material}",
        facts=[*facts, f"baseline {baseline}"] if baseline else facts,
        state=mark("unfinished" if unfinished else "finished"),
        key_figures=[_key_figure(variant, label, baseline) for variant in variants],
        sections=kept(
            [
                section("Variants", figures, [variants_table(index), rates_table(index)]),
                Section(title="First seed of each variant", parts=each_run(firsts)),
                setup(firsts[0][1] if firsts else None),
            ]
        ),
    )


def _overlays(runs: dict[str, list[Run]], index: Data) -> list[Drawing | None]:
    """Draw the curves of each variant's seeds, and how open the gates of its first seed are."""
    losses = {
        name: [curves.smoothed(curves.points(run.steps, "step", "loss")) for run in found]
        for name, found in runs.items()
    }
    firsts = {name: by_layer(found[0].activations, "open") for name, found in runs.items() if found}
    gates = {name: curve for name, curve in firsts.items() if curve}
    step = "training step"
    return [
        _losses(runs, index) if index.get("objective") else _scores(runs),
        curves.overlay("loss", "Training loss", losses, x=step, y="loss", note=f"{_EACH}; moving averages."),
        plots.layer_shares("open", "Open gates", gates, note="Share of pre-activations above 0, first seed."),
    ]


def _scores(runs: dict[str, list[Run]]) -> Drawing | None:
    scores = {name: [curves.points(run.evaluations, "step", "score") for run in found] for name, found in runs.items()}
    return curves.overlay("progress", "Scores while training", scores, x="training step", y="score", note=f"{_EACH}.")


def _losses(runs: dict[str, list[Run]], index: Data) -> Drawing | None:
    """Draw the loss on the validation text by tokens; those of a step are the first seed's, which differ little."""
    of_step = {
        name: dict(curves.points(found[0].evaluations, "step", "tokens")) for name, found in runs.items() if found
    }
    most = max((count for tokens in of_step.values() for count in tokens.values()), default=0.0)
    size, unit = next((each for each in _TOKENS if most >= each[0]), _TOKENS[-1])
    series = {
        name: [
            [(tokens[at] / size, loss) for at, loss in curves.points(run.evaluations, "step", "score") if at in tokens]
            for run in runs[name]
        ]
        for name, tokens in of_step.items()
    }
    target = number(index.get("target_loss"))
    note = _EACH + ("." if target is None else f". Dashed: the target, {target:.4f}.")
    return curves.overlay(
        "progress", "Loss on the validation text", series, x=f"tokens{unit}", y="loss", note=note, level=target
    )


def _key_figure(variant: Data, label: str, baseline: str) -> KeyFigure:
    """Return a variant's mean and what it differs by from the baseline."""
    name, scores = str(variant.get("name")), [variant.get("mean"), *numbers(variant.get("scores"))]
    difference = number(variant.get("difference"))
    p = p_value(variant.get("p_holm" if is_number(label) else "p_value"))
    if name == baseline or difference is None:
        note = "baseline" if name == baseline else ""
    else:
        note = f"{100 * difference:+.2f} points" if is_fraction(label, scores) else f"{difference:+{_form(label)}}"
        note += f", p\u00a0{p}" if p else ""
    return KeyFigure(name, _value(label, variant.get("mean"), scores) or "-", note)


def _value(label: str, value: object, among: Sequence[object]) -> str | None:
    """Format a value that is told apart from others: of numbers as many digits as of their differences."""
    return formatted(value, _form(label)) if is_number(label) else metric(label, value, among)


def _form(label: str) -> str:
    """Return the format of differences between values that are no fractions."""
    return ".4f" if is_number(label) else ".2f"


def variants_table(index: Data) -> Table:
    """Return a comparison's variants with their difference to the baseline."""
    label, found = str(index.get("metric") or "score"), items(index.get("variants"))
    scores = [score for each in found for score in [each.get("mean"), *numbers(each.get("scores"))]]
    fraction = is_fraction(label, scores)
    factor, unit, form = (100, " (points)", ".2f") if fraction else (1, "", _form(label))
    target = number(index.get("target_loss"))
    columns = {
        "variant": lambda each: str(each.get("name")),
        "#mean": lambda each: _value(label, each.get("mean"), scores),
        f"#standard deviation{unit}": lambda each: _times(each.get("std"), factor, form),
        f"#95 % interval{unit}": lambda each: half_width(each.get("interval"), factor, form),
        f"#difference{unit}": lambda each: _times(each.get("difference"), factor, f"+{form}"),
        f"#its 95 % interval{unit}": lambda each: half_width(each.get("difference_interval"), factor, form),
        "#p-value": lambda each: p_value(each.get("p_value")),
        "#p, corrected": lambda each: p_value(each.get("p_holm")),
        "#learning rate": lambda each: formatted(each.get("lr"), "g"),
        f"#tokens to {target:.4f}" if target else "#tokens": lambda each: _tokens(each),
        "#parameters": lambda each: count(each.get("parameters")),
        "#active a token": _active,
        "#units of an FFN": lambda each: count(each.get("width")),
        "#FFN FLOPs a token": lambda each: count(each.get("flops_per_token")),
        "#time": lambda each: duration(each.get("seconds")),
        "single seeds": lambda each: _singles(each, label, scores),
    }
    rows: list[list[TableCell]] = [[show(each) for show in columns.values()] for each in found]
    note = f"Difference and p-value: to the baseline {index.get('baseline')}." if index.get("baseline") else ""
    note += " Corrected: for the number of variants (Holm)." if any(each.get("p_holm") for each in found) else ""
    note += " Points: percentage points." if fraction else ""
    return filled(f"Variants by {label}", list(columns), rows, note.strip())


def rates_table(index: Data) -> Table:
    """Return what each learning rate gave on the seed that chose, the chosen ones marked."""
    found = [each for each in items(index.get("variants")) if each.get("rates")]
    rates = list(dict.fromkeys(name for each in found for name in mapping(each.get("rates"))))
    rows: list[list[TableCell]] = []
    for each in found:
        chosen, tried = formatted(each.get("lr"), "g"), mapping(each.get("rates"))
        shown = {rate: formatted(tried.get(rate), ".4f") or "diverged" for rate in rates}
        rows.append([str(each.get("name")), *(mark(f"{shown[r]} chosen") if r == chosen else shown[r] for r in rates)])
    note = f"Each variant has the best of them on seed {index.get('lr_seed')}, which no result is of."
    return filled(f"{index.get('metric')} by learning rate", ["variant", *(f"#{rate}" for rate in rates)], rows, note)


def _tokens(variant: Data) -> str | None:
    seeds = variant.get("tokens_to_target")
    if not isinstance(seeds, list):
        return None
    if variant.get("tokens_mean") is None:
        return f"{len(numbers(seeds))} of {len(seeds)} seeds get there"
    interval = half_width(variant.get("tokens_interval"), 1, ",.0f")
    return f"{count(variant.get('tokens_mean'))}" + (f" {interval}" if interval else "")


def _singles(variant: Data, label: str, among: Sequence[object]) -> str | None:
    return ", ".join(str(_value(label, score, among)) for score in numbers(variant.get("scores"))) or None


def _active(variant: Data) -> str | None:
    """Return a variant's active parameters, None where they are all."""
    active = variant.get("active_parameters")
    return None if active == variant.get("parameters") else count(active)


def _times(value: object, factor: float, form: str) -> str | None:
    known = number(value)
    return None if known is None else format(known * factor, form)
