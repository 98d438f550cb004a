"""Converted pico models, a few steps of training, and what the steps have changed."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from pico import FAMILIES
from torch import Tensor

import hf_glu
from hf_glu.training.loop import loop as loop_module

# family -> class, Auto class, the parts that are trained in full
MODELS = {
    "bert": ("BertForSequenceClassification", "AutoModelForSequenceClassification", {"classifier", "bert.pooler"}),
    "gpt2": ("GPT2ForSequenceClassification", "AutoModelForSequenceClassification", {"score"}),
    "t5": ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", set()),
}


def converted(family: str, to: str | None = None, **more: Any) -> Any:
    model = FAMILIES[family].make(MODELS[family][0], **more)
    hf_glu.convert(model, to or FAMILIES[family].exact, check=False)
    return model


def snapshot(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(model: Any, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def train(model: Any, inputs: dict[str, Tensor], steps: int = 5, groups: Any = None) -> list[float]:
    """Train towards logits of 1 with a lot of weight decay; return the losses."""
    optimizer = torch.optim.AdamW(groups or hf_glu.parameter_groups(model, 1e-2, 0.1))
    model.train()
    losses = []
    for _ in range(steps):
        torch.manual_seed(0)
        loss = (model(**inputs).logits - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def interrupt_at(monkeypatch, step):
    """Let Ctrl-C come in the middle of a step."""
    plain = loop_module.TrainingLoop._step

    def stepping(self):
        if self.progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self)

    monkeypatch.setattr(loop_module.TrainingLoop, "_step", stepping)
