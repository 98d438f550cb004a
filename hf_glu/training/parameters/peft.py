"""LoRA on converted models: which modules get adapters, and which are trained in full.

`lora_config` trains what a conversion adds, and not only the adapters. All else is PEFT's own:
``get_peft_model(model, lora_config(model))``, ``save_pretrained``, ``PeftModel.from_pretrained`` on the converted model
from its own folder, ``merge_and_unload``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_glu.config.extras import need
from hf_glu.errors import NoSiteError, OptionError, nearest
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.experts.group import Bank
from hf_glu.ffn.linear import LINEAR, weight_rows
from hf_glu.ffn.sites import Site, find_sites
from hf_glu.training.parameters.gates import count_parameters, train_all, train_only_gates
from hf_glu.training.parameters.parts import (
    activations,
    check_trainable,
    frozen_activations,
    head_names,
    output_embeddings,
    outside_names,
)

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["count_parameters", "frozen_activations", "lora_config", "target_names", "train_all", "train_only_gates"]

ALL = "all-linear"

# target -> the paths in a site's row that it means
_PARTS = {"ffn": ("gate", "in_proj", "out_proj"), "in": ("gate", "in_proj"), "out": ("out_proj",)}


def lora_config(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | Iterable[str] = "ffn",
    **more: Any,
) -> LoraConfig:
    """Make LoRA's configuration for ``model``, before PEFT wraps it.

    W x + (alpha / rank) B A x, with A ``[rank, in]`` and B ``[out, rank]`` (Hu et al. 2021,
    https://arxiv.org/abs/2106.09685). In full are trained, and saved with the adapter: the task's head, the pooler, and
    the activations' own parameters (mixes, PReLU), which LoRA would leave frozen.

    Args:
        model: converted or not.
        rank, alpha, dropout: of the adapters.
        targets: ``ffn`` (in- and out-projections of all FFN sites), ``in`` (their in-projections), ``out``,
            ``all-linear`` (all linear layers of the base model), or names of modules, whole or their ends. Experts get
            adapters on their 3-D weights; routers stay as they are, unless ``modules_to_save`` names them.
        more: further arguments of `peft.LoraConfig`; ``modules_to_save`` is added to.

    Raises:
        NoSiteError: no FFN of the model is known to hf_glu.
        OptionError: targets that the model doesn't have, or a head that is quantized.
        MissingPackageError: PEFT isn't installed.
    """
    need("peft", what="lora_config")
    from peft import LoraConfig

    full = [*head_names(model), *activations(model)]
    check_trainable(model, full)
    names = target_names(model, targets)
    modules = dict(model.named_modules())
    linear = [name for name in names if name in modules]
    parameters = [name for name in names if name not in modules]  # 3-D weights of experts
    transposed = any(isinstance(modules[name], Conv1D) for name in linear)
    if transposed and parameters:
        raise OptionError("PEFT has no adapter for both GPT-2's Conv1D layers and 3-D experts: use targets='ffn'")
    if more.get("use_dora"):
        _check_dora(modules, linear)
    full = [_wrapped(name, parameters) for name in full]
    saved = list(dict.fromkeys([*full, *(more.pop("modules_to_save", None) or [])]))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=linear,
        modules_to_save=saved or None,
        **{"fan_in_fan_out": transposed, **more},
        **({"target_parameters": parameters} if parameters else {}),
    )


def _check_dora(modules: Mapping[str, nn.Module], names: list[str]) -> None:
    """Raise OptionError if a projection has a row of zeros, by whose norm DoRA would divide."""
    for name in names:
        module = modules[name]
        if isinstance(module, LINEAR) and not weight_rows(module).any(dim=1).all():
            raise OptionError(
                f"{name} has rows of 0 (the up rows of an exact conversion), and DoRA divides by each row's norm: use "
                "LoRA without DoRA, or targets='out'"
            )


def _wrapped(name: str, parameters: list[str]) -> str:
    """Return a module's name after PEFT has wrapped the experts around it, once for each of their ``parameters``."""
    owners = [parameter.rpartition(".")[0] for parameter in parameters]
    for experts in dict.fromkeys(owners):
        if name.startswith(f"{experts}."):
            return experts + ".base_layer" * owners.count(experts) + name.removeprefix(experts)
    return name


def target_names(model: nn.Module, targets: str | Iterable[str] = "ffn") -> list[str]:
    """Return the full names of the modules, or parameters of experts, that ``targets`` means, as in `lora_config`.

    A site's own path, such as BERT's ``output.dense``, would match ``attention.output.dense`` as well.
    """
    if isinstance(targets, str) and targets not in (*_PARTS, ALL):
        raise OptionError(f"unknown targets {targets!r}; {nearest(targets, (*_PARTS, ALL))}; or give a list of names")
    if targets == ALL:
        return [*_all_linear(model), *_expert_names(model, ("in_proj", "out_proj"))]
    if not isinstance(targets, str):
        return list(dict.fromkeys(name for target in targets for name in _ending_in(model, target)))
    sites = find_sites(model)
    if not sites and not find_experts(model):
        raise NoSiteError(
            f"{type(model).__name__} has no feed-forward network that hf_glu knows (nor has a model that PEFT has "
            f"wrapped): use targets={ALL!r}, or a list of names"
        )
    parts = _PARTS[str(targets)]
    dense = [name for site in sites if site.kind != "experts" for name in _site_names(site, parts)]
    return [*dense, *_expert_names(model, parts)]


def _expert_names(model: nn.Module, parts: tuple[str, ...]) -> list[str]:
    """Return the 3-D parameters of experts, ours and Transformers' own."""
    groups = [name for name, module in model.named_modules() if isinstance(module, Bank)]
    names = [f"{group}.{part}" for group in groups for part in parts if part != "gate"]
    return names + [name for site in find_sites(model) if site.kind == "experts" for name in _site_names(site, parts)]


def _site_names(site: Site, parts: tuple[str, ...]) -> list[str]:
    prefix = f"{site.path}." if site.path else ""
    return [f"{prefix}{path}" for part in parts if (path := getattr(site.row, part)) is not None]


def _all_linear(model: nn.Module) -> list[str]:
    """Return the names of all linear layers outside of heads and of modules that are trained in full."""
    apart = tuple(f"{name}." for name in (*outside_names(model), *head_names(model), *activations(model)))
    embeddings = output_embeddings(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR) and module is not embeddings and not f"{name}.".startswith(apart)
    ]


def _ending_in(model: nn.Module, target: str) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    found = [name for name in names if f".{name}".endswith(f".{target}")]
    if not found:
        raise OptionError(f"{type(model).__name__} has no module {target!r}; {nearest(target, names)}")
    return found
