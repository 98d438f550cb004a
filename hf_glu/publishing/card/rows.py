"""The tables of a model card: what the conversion did, the run's results, and the comparison of several seeds."""

from __future__ import annotations

from collections.abc import Callable

from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.publishing.card.known import ComparisonFacts, Facts, VariantFacts
from hf_glu.publishing.card.plain import cell
from hf_glu.publishing.training import is_language
from hf_glu.tasks.metrics.shown import show_metric, show_metrics


def conversion_rows(facts: Facts) -> list[tuple[str, str]]:
    """Return the rows of the card's table on the conversion."""
    conversion = facts["conversion"]
    if not conversion or not conversion.get("changes", True):
        return []
    random = facts["run"]["options"].get("random") if facts["run"] else None
    difference, fit = conversion.get("max_abs_difference"), conversion.get("fit")
    measured = "not measured" if difference is None else f"{difference:.1e}"
    after = _parameters(conversion["parameters_after"], conversion.get("active_parameters_after"), " after")
    rows = [
        ("feed-forward networks" if not conversion["mixers"] else "mixers", f"{conversion['sites']:,} converted"),
        ("route", "random initialisation" if random else "; ".join(conversion["routes"])),
        ("promise", "none" if random else conversion["promise"]),
        ("to know", "" if random else "; ".join(conversion["notes"])),
        ("max abs difference of the outputs", "" if random else measured),
        (
            "relative error of a network's output, held-out tokens, mean",
            f"{fit['before']:.2%} -> {fit['after']:.2%} by the fit" if fit else "",
        ),
        ("parameters", f"{conversion['parameters_before']:,} before, {after}"),
    ]
    return [(name, cell(value)) for name, value in rows if value]


def healing_values(facts: Facts) -> JsonObject | None:
    """Return the values of the card's section on healing; None: there was none."""
    healing = facts.get("healing")
    if healing is None:
        return None
    before, after, own = healing["before"], healing["after"], healing["metrics"]
    names = list(dict.fromkeys([*own, *after]))
    rows = [(name, *(_shown(values, name) for values in (own, before, after))) for name in names]
    errors = [(name, "", *(f"{error:.2%}" for error in both)) for name, both in healing["sites"].items()]
    training = healing["training"]
    took = f"{training['tokens']:,} tokens in {training['steps']:,} steps, {training['seconds']:,.0f} s"
    return {"teacher": healing["teacher"], "took": took, "rows": [tuple(map(cell, row)) for row in (*rows, *errors)]}


def _shown(values: dict[str, float], name: str) -> str:
    return show_metric(name, values[name]) if name in values else ""


def result_values(facts: Facts) -> JsonObject:
    """Return the values of the card's section on results."""
    run, results, dense = facts["run"], facts["results"], facts["dense"]
    assert run is not None
    assert results is not None
    options, training = run["options"], results["training"]
    counts = {split: count for split, count in results["examples"].items() if split != "train"}
    rows = [("dense, fine-tuned the same way", dense)] if dense else []
    rows.append(("this model", results))
    settings = {
        "epochs": options.get("epochs") if "max_steps" not in options else None,
        "steps": training.get("steps"),
        "batch size": options.get("batch_size"),
        "learning rate": options.get("lr"),
        "weight decay": options.get("weight_decay"),
        "precision": options.get("mixed_precision"),
        "seed": options.get("seed"),
    }
    peft = {"lora": ", LoRA, merged", "gates": ", gates and norms only"}.get(options.get("peft", ""), "")
    return {
        "examples": ", ".join(f"{count:,} ({split})" for split, count in counts.items()),
        "train": f"{results['examples']['train']:,}",
        "rows": [(name, cell(_metrics(row.get("before"))), cell(_metrics(row["metrics"]))) for name, row in rows],
        "settings": ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None) + peft,
        "seconds": f"{training['seconds']:,.0f}",
        "hardware": run["hardware"],
        "versions": ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()),
        "reloaded": results.get("reloaded_equal"),
        "training": "training" if is_language(options) else "fine-tuning",
    }


def comparison_values(comparison: ComparisonFacts) -> JsonObject:
    """Return the values of the card's section on several seeds."""
    columns = _OF_LOSSES if "objective" in comparison else _OF_SCORES
    if "target_loss" in comparison:
        columns = {**columns, f"tokens to {comparison['target_loss']:.4f}": _tokens}
    rows = [
        (
            cell(f"**{row['name']}**" if row["name"] == comparison["mine"] else row["name"]),
            *(show(row) for show in columns.values()),
            _parameters(row["parameters"], row.get("active_parameters")),
        )
        for row in comparison["variants"]
    ]
    heads, seeds = ["variant", *columns, "parameters"], comparison["seeds"]
    return {**comparison, "count": len(seeds), "seeds": ", ".join(map(str, seeds)), "rows": rows, "heads": heads}


def _within(value: float | None, interval: list[float] | None, sign: str = "") -> str:
    """Return a number with half of its interval."""
    if value is None:
        return "-"
    return f"{value:{sign}.4f}" + (f" ± {(interval[1] - interval[0]) / 2:.4f}" if interval else "")


def _chance(p: float | None) -> str:
    return "-" if p is None else f"{p:.2g}"


def _tokens(row: VariantFacts) -> str:
    return f"{row['tokens_mean']:,.0f}" if "tokens_mean" in row else "-"


# what a comparison's columns are called, and what they show of a variant
_OF_SCORES: dict[str, Callable[[VariantFacts], str]] = {
    "mean": lambda row: f"{row['mean']:.2%}",
    "standard deviation": lambda row: f"{row['std']:.2%}" if "std" in row else "-",
    "difference": lambda row: f"{100 * row['difference']:+.2f} points" if "difference" in row else "-",
    "p": lambda row: _chance(row.get("p_value")),
}
_OF_LOSSES: dict[str, Callable[[VariantFacts], str]] = {
    "loss (95 %)": lambda row: _within(row["mean"], row.get("interval")),
    "difference (95 %)": lambda row: _within(row.get("difference"), row.get("difference_interval"), "+"),
    "p (Holm)": lambda row: _chance(row.get("p_holm")),
    "learning rate": lambda row: f"{row['lr']:g}" if "lr" in row else "-",
    "FFN FLOPs a token": lambda row: f"{row['flops_per_token']:,}" if "flops_per_token" in row else "-",
}


def _parameters(count: int, active: int | None, when: str = "") -> str:
    return f"{count:,}{when}" + (f", of which a token uses {active:,}" if active and active != count else "")


def _metrics(values: dict[str, float] | None) -> str:
    return show_metrics(values) if values else "-"
