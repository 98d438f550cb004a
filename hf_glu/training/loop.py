"""The training loop: Accelerate, batches of like lengths, a linear schedule with warmup."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_glu.errors import OptionError
from hf_glu.training.groups import parameter_groups

PRECISIONS = ("auto", "no", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to fine-tune.

    Attributes:
        epochs: passes over the training data (fractions of one, too).
        batch_size: sequences in a batch, on each process.
        lr, weight_decay, warmup: of AdamW and its linear schedule; ``warmup`` is a share of the steps.
        max_length: tokens after which a sequence is cut.
        clip: largest norm of the gradient.
        precision: ``auto`` (bf16 where the hardware computes in it), ``no``, ``bf16`` or ``fp16``.
        seed: of data order and dropout.
    """

    epochs: float = 3.0
    batch_size: int = 32
    lr: float = 2e-5
    weight_decay: float = 0.01
    warmup: float = 0.06
    max_length: int = 128
    clip: float = 1.0
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        positive = {key: getattr(self, key) for key in ("epochs", "batch_size", "lr", "max_length", "clip")}
        for key, value in positive.items():
            if not (math.isfinite(value) and value > 0):
                raise OptionError(f"{key} must be more than 0, got {value}")
        if not 0 <= self.warmup < 1:
            raise OptionError(f"warmup must be a share of the steps, 0 to 1, got {self.warmup}")
        if self.precision not in PRECISIONS:
            raise OptionError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    def mixed_precision(self) -> str:
        """Return what Accelerate takes."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if has_fast_bf16() else "no"

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain data, with the precision that is used."""
        return {**asdict(self), "mixed_precision": self.mixed_precision()}


def has_fast_bf16() -> bool:
    """Tell whether this machine computes in bfloat16 (AVX512-BF16 or AMX on a CPU)."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run of the loop did."""

    steps: int
    seconds: float
    loss: float

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return asdict(self)


def tokenize(data: Any, tokenizer: Any, max_length: int) -> Any:
    """Return ``data`` (columns ``text``, perhaps ``pair``, and ``label``) as token ids and ``labels``."""

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [rows[column] for column in ("text", "pair") if column in rows]
        return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": rows["label"]}

    return data.map(encode, batched=True, remove_columns=data.column_names)


def finetune(
    model: Any, data: Any, tokenizer: Any, options: TrainingOptions, *, title: str = "train"
) -> TrainingResult:
    """Fine-tune ``model`` in place on tokenized ``data``.

    Args:
        model: a model that returns a loss.
        data: from `tokenize`.
        tokenizer: pads the batches.
        options: how.
        title: of the progress bar.
    """
    set_seed(options.seed)
    accelerator = _accelerator(options.mixed_precision())
    generator = torch.Generator().manual_seed(options.seed)
    lengths = [len(ids) for ids in data["input_ids"]]
    sampler = LengthGroupedSampler(options.batch_size, lengths=lengths, generator=generator)
    loader = DataLoader(data, options.batch_size, sampler=sampler, collate_fn=DataCollatorWithPadding(tokenizer))
    steps = max(1, math.ceil(options.epochs * math.ceil(len(loader) / accelerator.num_processes)))
    optimizer = torch.optim.AdamW(parameter_groups(model, options.lr, options.weight_decay))
    warmup = int(options.warmup * steps) * accelerator.num_processes
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps * accelerator.num_processes)
    prepared, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    prepared.train()
    start, losses = time.perf_counter(), []
    bar = tqdm(_endless(loader), total=steps, desc=title, disable=not accelerator.is_main_process, leave=False)
    for step, batch in enumerate(bar, 1):
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), options.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
        if step == steps:
            break
    bar.close()
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)  # its forward computes in full precision again
    recent = losses[-max(1, len(losses) // 10) :]
    return TrainingResult(steps=steps, seconds=time.perf_counter() - start, loss=sum(recent) / len(recent))


def _accelerator(precision: str) -> Accelerator:
    """Return an Accelerator, also where an earlier run in this process had another precision."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision)


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def predict(model: Any, data: Any, tokenizer: Any, *, batch_size: int = 64, title: str = "predict") -> torch.Tensor:
    """Return the logits ``[examples, labels]`` of ``model`` on tokenized ``data``, in its order and in float32."""
    order = sorted(range(len(data)), key=lambda i: len(data[i]["input_ids"]))
    collate = DataCollatorWithPadding(tokenizer)
    device = next(model.parameters()).device
    logits: list[torch.Tensor] = []
    with _eval_mode(model):
        for begin in tqdm(range(0, len(order), batch_size), desc=title, leave=False):
            rows = [dict(data[i]) for i in order[begin : begin + batch_size]]
            batch = {key: value.to(device) for key, value in collate(rows).items() if key != "labels"}
            logits.append(model(**batch).logits.float().cpu())
    return torch.cat(logits)[torch.tensor(order).argsort()]
