"""Pico models with experts whose routers have losses, and the ways in which a step's loss is made."""

from __future__ import annotations

import torch
from pico import FAMILIES, make_native
from torch import nn
from torch.nn import functional

import hf_glu
from hf_glu.config.experts import ExpertOptions
from hf_glu.ffn.experts import find_experts

MODELS = {
    "gpt2": ("geglu_new", "gelu_new*2,geglu_new*2", {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
    "llama": ("swiglu", "swiglu*4", {}),
    "t5": ("reglu", "reglu*4", {"dropout_rate": 0}),
}


ROWS = torch.arange(64).reshape(8, 8) * 7 % 50 + 3


def made(family, balance=0.0, z=0.1):
    torch.manual_seed(0)
    name, experts, dropout = MODELS[family]
    model = FAMILIES[family].make(**dropout) if family in FAMILIES else make_native(family)
    hf_glu.convert(model, name, experts=experts, check=False)
    for ffn in find_experts(model).values():
        nn.init.normal_(ffn.router.weight, std=0.3)
        ffn.options = ffn.router.options = ExpertOptions(groups=ffn.options.groups, balance=balance, z=z)
    model.config.router_aux_loss_coef = balance
    return model.train()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def outside(model, rows, **more):
    logits = model(input_ids=rows, **more).logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, rows[:, 1:].flatten())


# how a micro-batch's loss is made: by the model, its mean over the number of parts; by the model, divided by the step's
# items; a tuple; outside of the model, left alone or not
WAYS = {
    "mean": lambda model, rows, parts: model(input_ids=rows, labels=rows).loss / parts,
    "items": lambda model, rows, parts: (
        model(input_ids=rows, labels=rows, num_items_in_batch=parts * rows[:, 1:].numel()).loss
    ),
    "tuple": lambda model, rows, parts: model(input_ids=rows, labels=rows, return_dict=False)[0] / parts,
    "alone": lambda model, rows, parts: outside(model, rows) / parts,
    "outside": lambda model, rows, parts: hf_glu.with_router_losses(outside(model, rows), model) / parts,
}
