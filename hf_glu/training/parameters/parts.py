"""Finding the parts of a model that are trained in full beside adapters: head, norms, our activations."""

from __future__ import annotations

import re

from torch import nn

from hf_glu.activation.parameters import activations
from hf_glu.errors import OptionError

# Heads by name, for models that have no base model inside (T5's for question answering).
HEADS = frozenset({"classification_head", "classifier", "qa_outputs", "score"})

# What PEFT puts into the name of a module, or of a copy of it.
_PEFT_NAME = re.compile(r"^base_model\.model\.|\.original_module(?=\.|$)|\.modules_to_save\.[^.]+|\.base_layer(?=\.|$)")


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalisation layer, and not what is named after one (RoBERTa-PreLayerNorm)."""
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def frozen_activations(model: nn.Module) -> list[str]:
    """Return the names of activations' own parameters that are frozen, so that a learnable activation doesn't learn.

    In a model wrapped by PEFT the names are those of the model inside, and the trained copy of a module counts.
    """
    trained: dict[str, bool] = {}
    for name, module in activations(model).items():
        for path, parameter in module.named_parameters():
            key = _PEFT_NAME.sub("", f"{name}.{path}")
            trained[key] = trained.get(key, False) or parameter.requires_grad
    return [name for name, trains in trained.items() if not trains]


def outside_names(model: nn.Module) -> list[str]:
    """Return the names of the parts of ``model`` outside of its base model: its heads."""
    children = dict(model.named_children())
    base = _base(model)
    if base:
        return [name for name in children if name != base]
    embeddings = output_embeddings(model)
    return [name for name, child in children.items() if name in HEADS or child is embeddings]


def head_names(model: nn.Module) -> list[str]:
    """Return the names of the task's head and of the pooler that it reads.

    A head with the output embeddings, a language model's, is none: it is pretrained, and mostly tied.
    """
    base, embeddings = _base(model), output_embeddings(model)
    names = [*outside_names(model), f"{base}.pooler" if base else "pooler"]
    modules = dict(model.named_modules())
    return [
        name
        for name in names
        if name in modules
        and any(True for _ in modules[name].parameters())
        and all(part is not embeddings for part in modules[name].modules())
    ]


def check_trainable(model: nn.Module, names: list[str]) -> None:
    """Raise OptionError if modules that are to be trained in full are quantized.

    Transformers quantizes a classifier that has a bias, although its weights are new.
    """
    quantized = [
        name for name in names if not all(p.is_floating_point() for p in model.get_submodule(name).parameters())
    ]
    if quantized:
        raise OptionError(
            f"{', '.join(quantized)}: quantized, so that it can't be trained: load the model with "
            f"BitsAndBytesConfig(..., llm_int8_skip_modules={quantized})"
        )


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return a language model's last projection, or None."""
    find = getattr(model, "get_output_embeddings", None)
    found: nn.Module | None = find() if find is not None else None
    return found


def _base(model: nn.Module) -> str:
    """Return the name of the base model inside of ``model``, empty where there is none."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    return prefix if prefix in dict(model.named_children()) else ""
