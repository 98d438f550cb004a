"""Tools that train: what is left in each parameter's gradient after a step, against the losses written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ecosystem import Make, gradients, ids
from taskdata import make_tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_glu.ffn.experts.losses import with_router_losses

ROWS = ids(8, 10, seed=3)
SMOOTHING = 0.1


class Note(TrainerCallback):
    """What a step is about to be made of."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        self.found = gradients(model)


def _trained(trainer: Any) -> dict[str, Tensor]:
    trainer.add_callback(note := Note())
    trainer.train()
    return note.found


def _wanted(make: Make, loss: Any, parts: int) -> dict[str, Tensor]:
    """Return the gradients of a loss of its logits and of the routers' own, the mean of so many micro-batches."""
    model = make().train()
    for rows in ROWS.chunk(parts):
        main = loss(model(input_ids=rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        with_router_losses(main / parts, model, 1 / parts).backward()
    return gradients(model)


ARGUMENTS = {
    "max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.0, "save_strategy": "no", "report_to": [], "use_cpu": True,
    "disable_tqdm": True, "logging_strategy": "no", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
}  # fmt: skip


def smoothed(make: Make, folder: Path) -> tuple[Any, Any]:
    """Trainer with label smoothing and accumulation."""
    arguments = TrainingArguments(
        output_dir=str(folder), label_smoothing_factor=SMOOTHING, train_sampling_strategy="sequential", **ARGUMENTS
    )
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    found = _trained(Trainer(model=make().train(), args=arguments, train_dataset=rows))
    return found, _wanted(
        make, lambda logits, labels: functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING), 4
    )


def sft(make: Make, folder: Path) -> tuple[Any, Any]:
    """TRL's SFTTrainer, whose loss is of chunks of the last hidden states, not of the model's logits."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(folder), train_sampling_strategy="sequential", bf16=False, gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, packing=False, **ARGUMENTS
    )  # fmt: skip
    trainer = SFTTrainer(
        model=make().train(), args=config, processing_class=make_tokenizer(),
        train_dataset=Dataset.from_list([{"input_ids": row.tolist()} for row in ROWS]),
    )  # fmt: skip
    return _trained(trainer), _wanted(make, functional.cross_entropy, 4)
