"""Model cards: numbers come from results, never from a person."""

from __future__ import annotations

import platform
from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_glu.training.job import Outcome

TEMPLATE = files("hf_glu") / "templates" / "model_card.md"
_LIMITS = (
    "One run, one seed and one small data set: a difference of a few tenths of a point between the rows is noise. "
    "Whatever the base model can't do or gets wrong, this one inherits."
)


def render_card(
    *, title: str, base_model: str, dataset: str, activation: str, validation_examples: int, seed: int,
    dense: Outcome | None, converted: Outcome,
) -> str:  # fmt: skip
    """Return the model card of a converted and fine-tuned classifier as Markdown."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    assert converted.report is not None
    report = converted.report.to_dict()
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["hf_glu", activation],
        metrics=["accuracy"],
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="text-classification", dataset_type=dataset, dataset_name=dataset, metric_type="accuracy",
                metric_value=round(converted.accuracy, 4),
            )
        ],
    )  # fmt: skip
    rows = [("dense, fine-tuned the same way", dense), (f"`{activation}`", converted)]
    training = converted.training
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=title,
        base_model=base_model,
        dataset=dataset,
        activation=activation,
        promise=report["promise"],
        route="; ".join(sorted({site["route"] for site in report["sites"]})),
        difference=f"{report['max_abs_difference']:.1e}",
        parameters_before=f"{report['parameters_before']:,}",
        parameters_after=f"{report['parameters_after']:,}",
        validation_examples=f"{validation_examples:,}",
        seeds=f"one seed ({seed})",
        hardware=f"{platform.machine()} CPU" if not _cuda() else _cuda(),
        rows=[
            {"name": name, "before": f"{row.accuracy_before:.2%}", "after": f"{row.accuracy:.2%}"}
            for name, row in rows
            if row is not None
        ],
        training=f"Training: {training.steps} steps in {training.seconds:.0f} s.",
        limits=_LIMITS,
    )
    return str(card)


def write_card(folder: Path, **content: Any) -> None:
    """Write `render_card`'s card as ``README.md``."""
    (folder / "README.md").write_text(render_card(**content), encoding="utf-8")


def _cuda() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
