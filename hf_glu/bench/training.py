"""Training a language model: our loop beside the stock Trainer's, on the same model, batches and precision.

A GPT-2 of 3 M parameters from scratch; a call is `STEPS` optimizer steps on blocks of random tokens, all that either
does around them included: batches, clipping, schedule, log, progress bar. Each starts anew with the model of the call
before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from hf_glu.bench.options import BenchOptions, Shape
from hf_glu.bench.running import Cell, Claim, Contender
from hf_glu.config.extras import need
from hf_glu.errors import OptionError
from hf_glu.training.language.blocks import BYTES, IDS
from hf_glu.training.language.examples import BlockExamples
from hf_glu.training.language.objectives import NextToken
from hf_glu.training.language.options import LanguageOptions, LanguageTraining
from hf_glu.training.language.tokenizers import train_tokenizer
from hf_glu.training.loop.accelerating import make_accelerator
from hf_glu.training.loop.loop import TrainingLoop

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

GPT2 = {"n_embd": 192, "n_layer": 6, "n_head": 6, "n_positions": 1024, "vocab_size": 2048}
# what a GPT-2 computes in its FFNs -> what config.hf_glu says
ACTIVATIONS: dict[str, dict[str, Any] | None] = {"gelu": None, "swiglu": {"width": "iso"}}
BATCH, LENGTH, STEPS = 16, 128, 10
OURS, TRAINER = "our loop", "Trainer"
TARGET = 1 / 0.95  # of the time: at least 0.95 of the tokens a second
PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def cells(options: BenchOptions) -> Iterator[Cell]:
    """Yield a cell for each activation.

    Raises:
        MissingPackageError: a package of training isn't there.
        OptionError: no model is trained in this dtype.
    """
    need("datasets", what="bench training")
    if options.dtype not in PRECISIONS:
        raise OptionError(f"models are trained in {', '.join(PRECISIONS)}, not in {options.dtype}")
    for tokens in options.sizes((LENGTH,)):
        for name in ACTIVATIONS:
            shape: Shape = {
                "of": f"GPT-2 of 3 M, {name}",
                "pass": f"{STEPS} training steps",
                "batch": BATCH,
                "tokens": tokens,
                "dtype": options.dtype,
            }
            claims = {OURS: Claim(peers=(TRAINER,), target=round(TARGET, 3))}
            yield Cell(shape=shape, build=partial(trainings, name, tokens, options), claims=claims)


def trainings(activation: str, length: int, options: BenchOptions) -> dict[str, Contender]:
    """Return the two trainings of a model."""
    examples = make_examples(length)
    settings = LanguageTraining(
        max_steps=STEPS, batch_size=BATCH, evaluate_every=0, max_length=length, precision=PRECISIONS[options.dtype]
    )
    calls = {
        OURS: partial(train_ours, make_gpt2(activation), examples, settings, options.device),
        TRAINER: partial(train_stock, make_gpt2(activation), examples, settings, options.device),
    }
    tokens = STEPS * BATCH * length
    return {name: Contender(call=partial(_quietly, call), tokens=tokens) for name, call in calls.items()}


def make_gpt2(activation: str) -> PreTrainedModel:
    """Build a GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**GPT2, activation_function=activation, bos_token_id=0, eos_token_id=0, use_cache=False)
    config.hf_glu = ACTIVATIONS[activation]
    return GPT2LMHeadModel(config)


def make_examples(length: int) -> BlockExamples:
    """Return blocks of random tokens."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, GPT2["vocab_size"], (STEPS * BATCH, length), generator=generator, device="cpu")
    blocks = Dataset.from_dict({IDS: ids.tolist(), BYTES: [float(length)] * len(ids)})
    tokenizer = train_tokenizer(["a"], 300, "clm")
    return BlockExamples(blocks, NextToken(tokenizer, LanguageOptions()), tokenizer, seed=0)


def train_ours(model: PreTrainedModel, examples: BlockExamples, settings: LanguageTraining, device: str) -> None:
    """Train a model by our loop."""
    accelerator = Accelerator(cpu=True) if device == "cpu" else make_accelerator(settings)
    TrainingLoop(model, examples, settings, accelerator).run()


def train_stock(model: PreTrainedModel, examples: BlockExamples, settings: LanguageTraining, device: str) -> None:
    """Train a model by the stock Trainer."""
    with TemporaryDirectory() as folder:
        make_trainer(model, examples, settings, device, folder).train()


def make_trainer(
    model: PreTrainedModel, examples: BlockExamples, settings: LanguageTraining, device: str, folder: str
) -> Trainer:
    """Make a stock Trainer that does what the settings of our loop say, on the batches of our loop."""
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    assert examples.blocks is not None
    plan = examples.plan(settings.batch_size, settings.seed)
    order = [row for step in range(STEPS) for row in plan[step]]
    rows = examples.blocks.select(order).remove_columns(BYTES)
    collator = DataCollatorForLanguageModeling(examples.tokenizer, mlm=False)

    class InOrder(Trainer):
        """A Trainer that takes its batches in the order of the data."""

        def get_train_dataloader(self) -> DataLoader:
            """Return the batches."""
            return self.accelerator.prepare(DataLoader(rows, batch_size=settings.batch_size, collate_fn=collator))

    precision = settings.mixed_precision()
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=settings.batch_size, learning_rate=settings.lr,
        weight_decay=settings.weight_decay, lr_scheduler_type=settings.schedule, max_grad_norm=settings.clip,
        warmup_steps=int(settings.warmup * STEPS), logging_steps=settings.log_every, save_strategy="no", report_to=[],
        bf16=precision == "bf16", fp16=precision == "fp16", use_cpu=device == "cpu", seed=settings.seed,
        dataloader_pin_memory=device != "cpu",
    )  # fmt: skip
    return InOrder(model, arguments, train_dataset=rows, data_collator=collator)


def _quietly(call: partial[None]) -> None:
    """Call without what is shown on the way: both show it."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        call()
