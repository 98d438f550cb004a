"""What TRL's trainers do, in little: a head whose output has the tokens' log-probabilities, which alone are trained."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass

import torch
from transformers import Trainer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput


@dataclass
class FusedOutput(ModelOutput):
    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def fuse(model):
    plain, config = model.forward, model.config

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return plain(*args, labels=labels, **kwargs)
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        inner = self.base_model(*args, **kwargs)
        logits, labels = self.get_output_embeddings()(inner.last_hidden_state[:, :-1]), labels[:, 1:]
        mask = labels != -100
        found = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        log_probs = found.masked_fill(~mask, 0)
        loss, aux = -log_probs.sum() / mask.sum(), None
        if kwargs.get("output_router_logits"):
            sizes = config.num_experts, config.num_experts_per_tok
            aux = load_balancing_loss_func(inner.router_logits, *sizes, kwargs.get("attention_mask"))
            loss = loss + config.router_aux_loss_coef * aux
        return FusedOutput(loss=loss, log_probs=log_probs, label_mask=mask, aux_loss=aux)

    model.forward = types.MethodType(forward, model)


class FusedTrainer(Trainer):
    """Trains the log-probabilities, and asks for router logits where the config has a coefficient."""

    asks = True

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        fuse(model)
        self.coefficient = model.config.router_aux_loss_coef if self.asks else 0.0
        model.config.output_router_logits = self.coefficient != 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.coefficient:
            inputs["output_router_logits"] = True
        outputs = model(**inputs, fused_lm_head=True)
        items = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -outputs.log_probs.sum() / torch.as_tensor(items).clamp(min=1)
        with torch.no_grad():
            model(**inputs, fused_lm_head=True)  # for metrics
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.coefficient:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.coefficient * outputs.aux_loss / steps
        return (loss, outputs) if return_outputs else loss
