"""What a person sees: tables from the same plain data that ``--json`` prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_glu.activation.listing import notes
from hf_glu.checkpoint.jsonio import to_json
from hf_glu.cli.forms import is_quiet
from hf_glu.config.showing import change, number
from hf_glu.tasks.metrics.shown import show_metric, show_metrics

Data = dict[str, Any]
PIPE_WIDTH = 160


def emit(result: Any, show: Callable[[Data, Console], None], *, json: bool) -> None:
    """Print ``result`` (plain data, or what has ``to_dict``) as one JSON object or as ``show`` does, or not at all."""
    data = result if isinstance(result, dict) else result.to_dict()
    if is_quiet():
        return
    if json:
        print(to_json(data))
    else:
        console = Console(markup=False, highlight=False)
        if not console.is_terminal:
            console.width = PIPE_WIDTH
        show(data, console)


def tell(line: str) -> None:
    """Print a line about the work that goes on, on standard error."""
    Console(stderr=True, markup=False, highlight=False).print(line, style="dim", soft_wrap=True)


def table(title: str, *columns: str) -> Table:
    """Return an empty table; columns whose name starts with ``#`` hold numbers."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(
            column.removeprefix("#"), justify="right" if column.startswith("#") else "left", overflow="fold"
        )
    return made


def activations(data: Data, console: Console) -> None:
    """Show the registry."""
    shown = table("Gated activations, [g | u] = gate and up halves", "name", "value", "source")
    for entry in data["activations"]:
        shown.add_row(entry["name"], entry["equation"], entry["paper"])
    for rule in data["rules"]:
        shown.add_row(rule["pattern"], rule["equation"], rule["paper"])
    console.print(shown)
    for line in notes(data):
        console.print(line)


def sites(data: Data, console: Console) -> None:
    """Show a model's FFN sites."""
    if not data["sites"]:
        console.print(f"{data['model']}: no feed-forward network that hf_glu knows")
        return
    shown = table(
        f"{len(data['sites'])} FFN sites", "site", "layout", "kind", "#hidden", "#width", "activation", "#parameters"
    )
    for site in data["sites"]:
        shown.add_row(
            site["name"], site["layout"], site["kind"], str(site["hidden"]), str(site["width"]), site["activation"],
            f"{site['parameters']:,}",
        )  # fmt: skip
    console.print(shown)


def _steps(data: Data, title: str) -> Table:
    measured = any("relative_error" in step for step in data["sites"])
    fitted = any(step.get("fit") for step in data["sites"])
    errors = [*(["#relative error"] if measured and not fitted else []), *(["#held-out error"] if fitted else [])]
    columns = ["site", "from", "route", "promise", *errors, "#parameters"]
    shown = table(title, *columns)
    for step in data["sites"]:
        error = [_fit(step["fit"]) if fitted else number(step["relative_error"])] if measured else []
        count = f"{step['parameters_before']:,} -> {step['parameters_after']:,}"
        shown.add_row(step["site"], step["from"], step["route"], step["promise"], *error, count)
    return shown


def _fit(fit: Data | None) -> str:
    return "-" if fit is None else f"{fit['before']:.1%} -> {fit['after']:.1%}"


def _target(data: Data) -> str:
    target = data["target"]
    return target if isinstance(target, str) else ", ".join(f"{name} ({layers})" for layers, name in target.items())


def _costs(data: Data, console: Console) -> None:
    console.print(f"parameters         {change(data['parameters_before'], data['parameters_after'])}")
    if data["active_parameters_after"] != data["parameters_after"]:
        console.print(f"used by a token    {data['active_parameters_after']:,}")
    console.print(f"FFN parameters     {change(data['ffn_parameters_before'], data['ffn_parameters_after'])}")
    console.print(f"FFN FLOPs a token  {change(data['flops_per_token_before'], data['flops_per_token_after'])}")
    console.print(f"bytes of weights   {change(data['memory_bytes_before'], data['memory_bytes_after'])}")
    for note in sorted({step["note"] for step in data["sites"] if step["note"]}):
        console.print(f"note               {note}")


def plan(data: Data, console: Console) -> None:
    """Show a plan."""
    console.print(_steps(data, f"Plan: {len(data['sites'])} FFNs to {_target(data)} ({data['promise']})"))
    _costs(data, console)


def report(data: Data, console: Console) -> None:
    """Show a conversion's report."""
    title = "converted" if data["changes"] else "already converted: nothing changed"
    console.print(_steps(data, f"{len(data['sites'])} FFNs to {_target(data)} ({data['promise']}), {title}"))
    _costs(data, console)
    if data["fit"]:
        console.print(f"held-out error     {_fit(data['fit'])} of an FFN's output, mean, before and after fitting")
    if data["max_abs_difference"] is not None:
        console.print(f"max |difference|   {data['max_abs_difference']:.1e} of the model's outputs")
    _division(data, console)
    if found := data.get("healing"):
        shown = table(_healed(found), "model", "metrics", "#training")
        rows = [("teacher", found["metrics"], None)] if found["metrics"] else []
        for name, values, took in [
            *rows,
            ("converted", found["before"], None),
            ("healed", found["after"], found["training"]),
        ]:
            shown.add_row(name, metrics(values), "-" if took is None else f"{took['seconds']:.0f} s")
        console.print(shown)
        _errors(found, console)


def _division(data: Data, console: Console) -> None:
    """Show what dividing FFNs among experts costs: their errors, and the model's perplexity on held-out texts."""
    if found := data.get("curves"):
        mean = [sum(errors) / len(found) for errors in zip(*found.values(), strict=True)]
        curve = ", ".join(f"{number}: {error:.1%}" for number, error in enumerate(mean, start=1))
        console.print(f"error by experts   {curve} of an FFN's output on held-out tokens, mean, by routed experts on")
    if found := data.get("perplexity"):
        console.print(
            f"perplexity         {found['before']:.2f} -> {found['after']:.2f} on {found['tokens']:,} held-out tokens"
        )


def _healed(found: Data) -> str:
    return (
        f"healed by {found['teacher']}: {found['training']['tokens']:,} tokens in {found['training']['steps']:,} steps"
    )


def _errors(found: Data, console: Console) -> None:
    """Show each FFN's error before and after healing."""
    if not found["sites"]:
        return
    shown = table("relative error of an FFN's output", "site", "#before", "#after")
    for name, errors in found["sites"].items():
        shown.add_row(name, *(f"{error:.1%}" for error in errors))
    console.print(shown)


def verification(data: Data, console: Console) -> None:
    """Show a comparison."""
    shown = table("Comparison", "output", "#max |difference|")
    for output, difference in data["differences"].items():
        shown.add_row(output, number(difference, ".3e"))
    console.print(shown)
    verdict = "the same" if data["same"] else "different"
    console.print(f"{verdict} (tolerance {data['tolerance']:g}); parameters {change(*data['parameters'])}")


def metrics(values: dict[str, float]) -> str:
    """Return metrics with their names, ``84.11%`` where there is one only."""
    return show_metrics(values) if len(values) != 1 else show_metric(*next(iter(values.items())))


def counted(rows: list[Data]) -> dict[str, str]:
    """Return the columns of parameters and their keys: the active ones, too, where any row has experts."""
    experts = any(row["active_parameters"] != row["parameters"] for row in rows)
    return {"#parameters": "parameters"} | ({"#active a token": "active_parameters"} if experts else {})


def finetuned(data: Data, console: Console) -> None:
    """Show a fine-tuning job's final table."""
    examples, options = data["outcome"]["examples"], data["options"]
    counts = ", ".join(f"{count:,} {split}" for split, count in examples.items())
    named = data["rows"][-1]["metrics"]
    shown = table(
        f"{data['task']}: {counts} examples, seed {options['seed']}, mixed precision {options['mixed_precision']}",
        "model", f"#{next(iter(named)) if len(named) == 1 else 'metrics'}", *counted(data["rows"]),
        "#max |difference| to dense", "#training",
    )  # fmt: skip
    for row in data["rows"]:
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f} s"
        costs = [f"{row[key]:,}" for key in counted(data["rows"]).values()]
        shown.add_row(row["model"], metrics(row["metrics"]), *costs, number(row["max_abs_difference"]), seconds)
    console.print(shown)
    if found := data["outcome"].get("healing"):
        console.print(_healed({**found, "training": data["outcome"]["training"]}))
        _errors(found, console)
    if data["outcome"]["reloaded_equal"] is not None:
        equal = "equal bitwise" if data["outcome"]["reloaded_equal"] else "DIFFERENT"
        console.print(f"saved, and loaded in a fresh process: its predictions are {equal}")
    console.print(f"{data['seconds']:.0f} s in all")


def perplexity(data: Data, console: Console) -> None:
    """Show what a language model makes of a text."""
    shown = table(
        f"{data['model']}, {data['objective']}", *(f"#{name}" for name in data["metrics"]), "#tokens", "#time"
    )
    values = (show_metric(name, value) for name, value in data["metrics"].items())
    shown.add_row(*values, f"{data['tokens']:,}", f"{data['seconds']:.0f} s")
    console.print(shown)


def path(data: Data, console: Console) -> None:
    """Show where a file was written."""
    console.print(data["report"], soft_wrap=True)


def suite(data: Data, console: Console) -> None:
    """Show a suite's results."""
    shown = table(f"{data['suite']}: {data['model']}, {data['activation'] or 'dense'}", "task", "metrics", "#score")
    for name, results in data["tasks"].items():
        shown.add_row(name, metrics(results["metrics"]), f"{results['score']:.2%}")
    console.print(shown)
    mark = f" (partial: {', '.join(data['missing'])} missing)" if data["partial"] else ""
    if data["score"] is not None:
        console.print(f"mean of the tasks' scores {data['score']:.2%}{mark}")


def coverage(data: Data, console: Console) -> None:
    """Show the coverage of the text families."""
    shown = table("Coverage", "model type", "class", "#sites", "converted to", "#max |difference|", "#s", "reason")
    for row in data["rows"]:
        shown.add_row(
            row["model_type"], row["model_class"], str(row["sites"]), row["target"] or "-",
            number(row["max_abs_difference"]), f"{row['seconds']:.1f}", row["reason"] or "",
        )  # fmt: skip
    console.print(shown)
    console.print(data["summary"])


def exported(data: Data, console: Console) -> None:
    """Show what an export wrote."""
    console.print(data["note"])
    shown = table("", "file", "#bytes")
    for name, size in data["files"].items():
        shown.add_row(name, f"{size:,}")
    console.print(shown)
    for shape, difference in data["differences"].items():
        console.print(f"max |difference| to the model, {shape}: {number(difference)} (tolerance {data['tolerance']:g})")


def diagnosis(data: Data, console: Console) -> None:
    """Show what the doctor found, a line each."""
    for check in data["checks"]:
        console.print(
            f"{'ok  ' if check['ok'] else 'FAIL' if check['needed'] else 'none'} {check['name']}: {check['detail']}"
        )
