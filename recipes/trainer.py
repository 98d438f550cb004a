"""The stock Trainer on a converted model: nothing of hf_glu is in the training itself but its parameter groups.

python recipes/trainer.py --model MODEL [--to geglu] [--steps 50]
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from transformers import Trainer, TrainingArguments

import hf_glu
from hf_glu.tasks import find_task
from hf_glu.tasks.loading import load_task
from hf_glu.training.data.features import make_features
from hf_glu.training.data.models import load_for_task


def main(
    model: Annotated[str, typer.Option(help="Pretrained checkpoint: local folder or Hub id.")],
    task: str = "movie_reviews",
    dataset: Annotated[str | None, typer.Option(help="Local folder of the task's data.")] = None,
    to: str = "geglu",
    output: str = "runs/trainer",
    steps: int = 50,
    max_length: int = 64,
) -> None:
    """Convert, train with the stock Trainer, and print its evaluation loss."""
    chosen = find_task(task)
    splits = load_task(chosen, dataset)
    classifier, tokenizer, _ = load_for_task(model, chosen, form="classes")
    report = hf_glu.convert(classifier, to)
    print(f"{to}: max |difference| to the dense model {report.max_abs_difference:.1e}")
    train, validation = (
        make_features(chosen, splits[split], tokenizer, max_length=max_length, text=False).data
        for split in ("train", chosen.validation[0])
    )
    arguments = TrainingArguments(
        output, max_steps=steps, per_device_train_batch_size=16, report_to=[], use_cpu=not torch.cuda.is_available()
    )
    optimizer = torch.optim.AdamW(hf_glu.parameter_groups(classifier, 5e-5, 0.01))
    trainer = Trainer(
        classifier, arguments, train_dataset=train, eval_dataset=validation, processing_class=tokenizer,
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    print(f"evaluation loss {trainer.evaluate()['eval_loss']:.4f}")


if __name__ == "__main__":
    typer.run(main)
