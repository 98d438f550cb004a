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


def _without_balance(model: Any) -> Any:
    if hasattr(model.config, "router_aux_loss_coef"):
        model.config.router_aux_loss_coef = 0.0
    return model


def _wanted(make: Make, loss: Any, parts: int, *, balance: bool = True) -> dict[str, Tensor]:
    """Return the gradients of a loss of its logits and of the routers' own, the mean of so many micro-batches."""
    model = _without_balance(make().train()) if balance is False else make().train()
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
        output_dir=str(folder), train_sampling_strategy="sequential", **TRL,
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, packing=False, **ARGUMENTS
    )  # fmt: skip
    trainer = SFTTrainer(
        model=make().train(), args=config, processing_class=make_tokenizer(),
        train_dataset=Dataset.from_list([{"input_ids": row.tolist()} for row in ROWS]),
    )  # fmt: skip
    return _trained(trainer), _wanted(make, functional.cross_entropy, 4, balance=False)


TRL = {
    "bf16": False,
    "gradient_checkpointing": False,
    "router_aux_loss_coef": 0.0,
}  # which else TRL computes of all layers at once: tests/recipes/test_sft.py


def _log_probabilities(model: Any, rows: Tensor, kept: int) -> Tensor:
    """Return what a model gives each of the last tokens of texts, as its logits say it."""
    logits = model(input_ids=rows).logits[:, :-1].log_softmax(-1)
    return logits.gather(-1, rows[:, 1:, None])[..., 0][:, -kept:]


def dpo(make: Make, folder: Path) -> tuple[Any, Any]:
    """TRL's DPOTrainer: a loss of chunks of the last hidden states of preferred and rejected texts."""
    import copy

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer, model = make_tokenizer(), make().train()
    words = [word for word, at in tokenizer.get_vocab().items() if 3 < at < 50 and ":" not in word]
    rows = [
        {"prompt": " ".join(words[i : i + 3]), "chosen": " " + " ".join(words[i + 4 : i + 8]),
         "rejected": " " + " ".join(words[i + 9 : i + 13])} for i in range(2)
    ]  # fmt: skip
    config = DPOConfig(
        output_dir=str(folder), train_sampling_strategy="sequential", **TRL,
        **{**ARGUMENTS, "gradient_accumulation_steps": 1},
    )  # fmt: skip
    found = _trained(
        DPOTrainer(model, ref_model=copy.deepcopy(model), args=config, train_dataset=Dataset.from_list(rows),
                   processing_class=tokenizer)
    )  # fmt: skip
    texts = [row["prompt"] + row[kind] for kind in ("chosen", "rejected") for row in rows]
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts])
    alone = _without_balance(make().train())
    each = _log_probabilities(alone, ids, ids.shape[1] - 3).sum(1)
    chosen, rejected = (each - each.detach()).chunk(2)
    with_router_losses(-functional.logsigmoid(0.1 * (chosen - rejected)).mean(), alone).backward()
    return found, gradients(alone)


def grpo(make: Make, folder: Path) -> tuple[Any, Any]:
    """TRL's GRPOTrainer: the same of texts that were generated, here given ones."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    kept, advantages = 4, torch.tensor([1.0, -1.0, 0.5, -0.5])
    rows = ROWS[:4]
    given = {
        "prompt_ids": rows[:, :-kept], "prompt_mask": torch.ones_like(rows[:, :-kept]), "advantages": advantages,
        "completion_ids": rows[:, -kept:], "completion_mask": torch.ones_like(rows[:, -kept:]),
        "num_items_in_batch": torch.tensor(rows[:, -kept:].numel()),
    }  # fmt: skip

    class Given(GRPOTrainer):
        def _prepare_inputs(self, *_: Any) -> dict[str, Tensor]:
            return given

    tokenizer = make_tokenizer()
    options = {**ARGUMENTS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    config = GRPOConfig(output_dir=str(folder), beta=0.0, loss_type="grpo", num_generations=4, **TRL, **options)
    found = _trained(
        Given(make().train(), lambda completions, **_: [0.0] * len(completions), args=config,
              train_dataset=Dataset.from_list([{"prompt": "a film"}] * 4), processing_class=tokenizer)
    )  # fmt: skip
    alone = _without_balance(make().train())
    each = _log_probabilities(alone, rows, kept)
    ratio = (each - each.detach()).exp()
    with_router_losses(-(ratio * advantages[:, None]).mean(1).mean(), alone).backward()
    return found, gradients(alone)


def zero(make: Make, folder: Path) -> tuple[Any, Any]:
    """DeepSpeed's ZeRO-2: parameters become views of one flat buffer, and hooks move gradients away as they come."""
    model = make().train()
    names, parameters = zip(*model.named_parameters(), strict=True)
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    reduced: dict[str, Tensor] = {}

    def reduce(name: str) -> Any:
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            reduced[name] = reduced.get(name, 0) + parameter.grad
            parameter.grad = None

        return take

    for name, parameter, part in zip(names, parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
        parameter.register_post_accumulate_grad_hook(reduce(name))
    for rows in ROWS.chunk(2):
        (model(input_ids=rows, labels=rows).loss / 2).backward()
    alone = make().train()
    for rows in ROWS.chunk(2):
        (alone(input_ids=rows, labels=rows).loss / 2).backward()
    return reduced, gradients(alone)
