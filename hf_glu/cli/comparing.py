"""``hf-glu compare``: several variants of a model with several seeds, and their table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_glu.cli import tables
from hf_glu.cli.commands import Json, app
from hf_glu.cli.early import check_jobs, check_language
from hf_glu.cli.fields import with_flags
from hf_glu.cli.quiet import quieten
from hf_glu.cli.training import emit_once, read_options
from hf_glu.config.extras import lacking, need
from hf_glu.errors import OptionError
from hf_glu.training.comparing.variants import read_variant
from hf_glu.training.filling import read_yaml
from hf_glu.training.language.options import LanguageOptions, LanguageTraining, language_options
from hf_glu.training.options import OF_VARIANTS, JobOptions, TrainingOptions
from hf_glu.training.packaged import find_config

_CONFIG = "Of a task: YAML file of options, as --options. Of a new language model: its config."
_OPTIONS = "YAML file of options, or the name of one that `hf-glu configs` lists; flags override it."
_VARIANTS = "Such as dense,geglu,swiglu:iso,random-geglu, of a new language model gelu, too; first the baseline."
OF_TASKS, OF_NEW, OF_TRAINED = (
    "dense,random-geglu,geglu,swiglu,swiglu:iso", "dense,geglu:iso,swiglu:iso", "dense,geglu,swiglu,swiglu:iso",
)  # fmt: skip
# what makes a comparison one of language models
OF_LANGUAGE = ("data", "objective")


@app.command()
@with_flags(JobOptions, LanguageOptions, TrainingOptions, LanguageTraining)
def compare(
    given: dict[str, Any],
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help="More files of --data.")] = None,
    config: Annotated[str | None, typer.Option(help=_CONFIG)] = None,
    options: Annotated[Path | None, typer.Option(help=_OPTIONS)] = None,
    variants: Annotated[str | None, typer.Option(help=_VARIANTS)] = None,
    seeds: Annotated[str, typer.Option(help="Such as 0,1,2.")] = "0,1,2",
    lrs: Annotated[str | None, typer.Option(help="Learning rates to choose from for each variant: 3e-4,1e-3.")] = None,
    lr_seed: Annotated[int | None, typer.Option(help="The seed that chooses; the one above --seeds.")] = None,
    target_loss: Annotated[float | None, typer.Option(help="Tell the tokens to it; else the baseline's own.")] = None,
    json: Json = False,
) -> None:
    """Compare activations with several seeds, on a task or (with --data) in language models: mean, test, plot."""
    values = {**(read_yaml(find_config(options)) if options else {}), **given}
    chosen = _numbers(seeds, "--seeds", int)
    if (option := next((key for key in OF_VARIANTS if key in given), None)) is not None:
        raise OptionError(f"{option} does nothing in a comparison: --variants and --seeds say it")
    language = any(key in values for key in OF_LANGUAGE)
    _check_kind(values, language=language)
    if language:
        if files:
            values["data"] = [*values.get("data", []), *files]
        search = {"lrs": _numbers(lrs, "--lrs", float) if lrs else (), "lr_seed": lr_seed, "target_loss": target_loss}
        result = _language_models({**values, **({"config": config} if config else {})}, variants, chosen, search)
        show = language_models
    else:
        if extra := {"--lrs": lrs, "--lr-seed": lr_seed, "--target-loss": target_loss, "FILE": files}:
            _refuse([name for name, value in extra.items() if value], "language models: give their text with --data")
        if config and options:
            raise OptionError("--config and --options are the same: give one of them")
        result, show = _classifiers(config or options, given, variants, chosen), classifiers
    emit_once(result, show, json=json)


def _numbers(text: str, flag: str, kind: Callable[[str], Any]) -> list[Any]:
    """Read ``0,1,2`` or ``3e-4,1e-3``.

    Raises:
        OptionError: anything else.
    """
    parts, sample = [part.strip() for part in text.split(",")], "0,1,2" if kind is int else "3e-4,1e-3"
    try:
        if kind is int and not all(part.isdecimal() for part in parts):
            raise ValueError
        return [kind(part) for part in parts]
    except ValueError:
        raise OptionError(f"{flag} must be numbers such as {sample}, got {text!r}") from None


def _check_kind(values: Mapping[str, object], *, language: bool) -> None:
    """Raise OptionError for an option of the other kind of comparison."""
    mine, others = (LanguageOptions, JobOptions) if language else (JobOptions, LanguageOptions)
    names = {each.name for each in dataclasses.fields(others)} - {each.name for each in dataclasses.fields(mine)}
    what = "a task: leave --data and --objective out" if language else "language models: give their text with --data"
    _refuse([f"--{key.replace('_', '-')}" for key in values if key in names], what)


def _refuse(flags: Sequence[str], what: str) -> None:
    if flags:
        raise OptionError(f"{flags[0]} is for {what}")


def _classifiers(
    config: str | Path | None, given: dict[str, Any], variants: str | None, seeds: list[int]
) -> dict[str, Any]:
    job, options = read_options(Path(config) if config else None, given)
    if not job.output:
        raise OptionError("compare needs a folder for its runs: give it with --output")
    names = (variants or OF_TASKS).split(",")
    need(*job.packages, "scipy", what="compare")
    check_jobs(*(read_variant(name).job(job) for name in names))
    quieten()

    from hf_glu.training.comparing.classifiers import compare as run

    result = run(names, seeds, job, options, tables.tell)
    return {**result, "report": _try_report(job.folder)}


def _language_models(
    values: dict[str, Any], variants: str | None, seeds: list[int], search: dict[str, Any]
) -> dict[str, Any]:
    if search["lrs"] and "lr" in values:
        raise OptionError("--lr and --lrs exclude each other: leave one of them out")
    job, options = language_options(values)
    if not job.output:
        raise OptionError("compare needs a folder for its runs: give it with --output")
    check_language(job)
    need("datasets", "scipy", *(["peft"] if job.peft == "lora" else []), what="compare")
    quieten()

    from hf_glu.training.comparing.language import compare_language_models

    names = (variants or (OF_NEW if job.config else OF_TRAINED)).split(",")
    result = compare_language_models(names, seeds, job, options, on_run=tables.tell, **search)
    return {**result, "report": _try_report(job.folder)}


def _try_report(folder: Path | None) -> str | None:
    """Write the page with the plot where the extra that draws is installed; return where it is."""
    from accelerate import PartialState

    from hf_glu.publishing.report import write_report

    if folder is None or lacking("jinja2", "matplotlib", what="a report") or not PartialState().is_main_process:
        return None
    return str(write_report(folder))


def classifiers(data: tables.Data, console: Console) -> None:
    """Show a comparison on a task."""
    seeds = ", ".join(map(str, data["seeds"]))
    shown = tables.table(
        f"{data['task']}: {data['metric']} of {data['model']}, seeds {seeds}", "variant", "#mean",
        "#standard deviation", f"#difference to {data['baseline']}", "#p (paired t-test)",
        *tables.counted(data["variants"]), "#training",
    )  # fmt: skip
    for row in data["variants"]:
        difference = "-" if row["difference"] is None else f"{100 * row['difference']:+.2f} points"
        spread = "-" if row["std"] is None else f"{100 * row['std']:.2f}"
        shown.add_row(
            row["name"], f"{row['mean']:.2%}", spread, difference, _chance(row["p_value"]), *_costs(row, data)
        )
    console.print(shown)
    _tell_report(data, console)


def language_models(data: tables.Data, console: Console) -> None:
    """Show a comparison of language models; what follows a ± is half of a 95 % interval."""
    seeds, rows = ", ".join(map(str, data["seeds"])), data["variants"]
    chosen = {"#lr": lambda row: f"{row['lr']:g}"} if "lr_seed" in data else {}
    aimed = {f"#tokens to {data['target_loss']:.4f}": _tokens} if "target_loss" in data else {}
    shown = tables.table(
        f"{data['task']} on {', '.join(data['data'])}: {data['metric']} of {data['model']}, seeds {seeds}", "variant",
        f"#{data['metric']}", f"#difference to {data['baseline']}", "#p (paired, Holm)", *chosen, *aimed,
        *tables.counted(rows), "#FFN FLOPs a token", "#training",
    )  # fmt: skip
    for row in rows:
        *counts, seconds = _costs(row, data)
        shown.add_row(
            row["name"], _within(row["mean"], row["interval"]),
            _within(row["difference"], row["difference_interval"], "+"),
            _chance(row["p_holm"]), *(cell(row) for cell in (*chosen.values(), *aimed.values())), *counts,
            f"{row['flops_per_token']:,}", seconds,
        )  # fmt: skip
    console.print(shown)
    console.print("±: half of the 95 % interval over the seeds; p: corrected for the number of variants")
    if "lr_seed" in data:
        console.print(f"learning rates: the best of {', '.join(rows[0]['rates'])} with seed {data['lr_seed']}")
    _tell_report(data, console)


def _costs(row: tables.Data, data: tables.Data) -> list[str]:
    return [*(f"{row[key]:,}" for key in tables.counted(data["variants"]).values()), f"{row['seconds']:.0f} s"]


def _within(value: float | None, interval: list[float] | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.4f}" + (f" ± {(interval[1] - interval[0]) / 2:.4f}" if interval else "")


def _tokens(row: tables.Data) -> str:
    if row["tokens_mean"] is None:
        there = sum(tokens is not None for tokens in row["tokens_to_target"])
        return f"{there} of {len(row['tokens_to_target'])} seeds"
    low, high = row["tokens_interval"]
    return f"{row['tokens_mean']:,.0f} ± {(high - low) / 2:,.0f}"


def _chance(p: float | None) -> str:
    return "-" if p is None else "<0.01" if p < 0.01 else f"{p:.2f}"


def _tell_report(data: tables.Data, console: Console) -> None:
    if data["report"]:
        console.print(f"plot and curves: {data['report']}", soft_wrap=True)
