"""Model cards: numbers come from results, never from a person."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

TEMPLATE = files("hf_glu") / "templates" / "model_card.md"
_LIMITS = (
    "One run, one seed and one small data set: a difference of a few tenths of a point between the rows is noise. "
    "Whatever the base model can't do or gets wrong, this one inherits."
)


def render_card(
    title: str, base_model: str, entry: dict[str, Any], *, dense: dict[str, Any] | None, converted: dict[str, Any]
) -> str:
    """Return the model card of a converted and fine-tuned model as Markdown.

    Args:
        title: the model's name.
        base_model: what it was converted from.
        entry: what ``run.json`` says.
        dense, converted: results of the jobs; numbers come from there only.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    report, training = converted["conversion"], converted["training"]
    task, activation = entry["task"], entry["activation"]
    text = entry.get("text", False)
    kind = "text2text-generation" if text else "text-classification"
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag=kind,
        tags=["hf_glu", activation],
        metrics=list(converted["main"]),
        model_name=title,
        eval_results=[
            EvalResult(
                task_type=kind, dataset_type=task, dataset_name=task, metric_type=name.rpartition("/")[2],
                metric_name=name, metric_value=round(value, 4),
            )
            for name, value in converted["metrics"].items()
        ],
    )  # fmt: skip
    rows = [("dense, fine-tuned the same way", dense), (f"`{activation}`", converted)]
    validation = sum(count for split, count in converted["examples"].items() if split != "train")
    return str(ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=title,
        auto_class="AutoModelForSeq2SeqLM" if text else "AutoModelForSequenceClassification",
        base_model=base_model,
        dataset=task,
        activation=activation,
        promise=report["promise"],
        route="; ".join(sorted({site["route"] for site in report["sites"]})),
        difference="not measured" if report["max_abs_difference"] is None else f"{report['max_abs_difference']:.1e}",
        parameters_before=f"{report['parameters_before']:,}",
        parameters_after=f"{report['parameters_after']:,}",
        active=_active(converted),
        validation_examples=f"{validation:,}",
        seeds=f"one seed ({entry['options']['seed']})",
        hardware=entry["hardware"],
        rows=[
            {"name": name, "before": _metrics(row["before"]), "after": _metrics(row["metrics"])}
            for name, row in rows
            if row is not None
        ],
        training=f"Training: {training['steps']} steps in {training['seconds']:.0f} s.",
        limits=_LIMITS,
    ))  # fmt: skip


def _active(results: dict[str, Any]) -> str:
    """Return what follows the number of parameters where a token doesn't use them all."""
    active = results["active_parameters"]
    return "" if active == results["parameters"] else f", of which a token uses {active:,}"


def _metrics(values: dict[str, float] | None) -> str:
    return "-" if values is None else ", ".join(f"{name} {value:.2%}" for name, value in values.items())


def write_card(folder: Path, base_model: str, entry: dict[str, Any], **results: Any) -> None:
    """Write `render_card`'s card as ``README.md``."""
    (folder / "README.md").write_text(render_card(folder.name, base_model, entry, **results), encoding="utf-8")
