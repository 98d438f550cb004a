"""Training the gates only: the half of each in-projection that a conversion has added, the norms and the task's head.

``[gate | up]`` is one parameter, so that a half is trained through a mask on its gradient. An optimizer must not decay
such a parameter, or the frozen rows shrink all the same: `hf_glu.parameter_groups` keeps them in a group of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_glu.activation.parameters import activations
from hf_glu.compat.of_torch import FORWARD_PRE_HOOKS, TENSOR_HOOKS
from hf_glu.errors import ConversionError, NoSiteError, OptionError, nearest
from hf_glu.ffn.linear import AnyLinear
from hf_glu.ffn.sites import Site, find_sites
from hf_glu.training.parameters.parts import check_trainable, head_names, is_norm

HALVES = ("gate", "up")  # in the order of the rows


def train_only_gates(
    model: nn.Module, halves: Sequence[str] = ("up",), *, norms: bool = True, head: bool = True
) -> dict[str, int]:
    """Freeze all of ``model`` but halves of its gated FFNs, its activations' own parameters, the norms and the head.

    A natively gated FFN has the same halves, as rows of its packed in-projection or as projections of their own. They
    are trained, too, although they are pretrained there and not new. Calling it again starts afresh; `train_all` takes
    it back.

    The optimizer must not decay the weights of which it trains a half: give it ``parameter_groups(model, lr,
    weight_decay)``, or no decay, a Trainer's default. Parameters that are sharded flat (FSDP, DeepSpeed ZeRO-3) have
    gradients without rows, which can't be masked.

    Args:
        model: with gated FFNs, converted or native.
        halves: ``up`` (what a conversion adds), ``gate`` or both.
        norms: train the normalisation layers.
        head: train the task's head, and the pooler that it reads. A language model's is tied to the embeddings, and
            frozen like them.

    Returns:
        See `count_parameters`.

    Raises:
        OptionError: a half that is none; a quantized model.
        NoSiteError: no FFN of the model is gated.
        ConversionError: its gates are in expert banks.
    """
    chosen = _check_halves(halves)
    sites = [site for site in find_sites(model) if site.native or site.widened]
    if not sites:
        raise NoSiteError(f"{type(model).__name__} has no gated feed-forward network: convert it first")
    check_trainable(model, [site.name for site in sites] + (head_names(model) if head else []))
    if banks := [site.name for site in sites if site.kind == "experts"]:
        raise ConversionError(f"{banks[0]}: the gates of expert banks can't be trained by themselves: use LoRA")
    train_all(model)
    model.requires_grad_(False)
    for site in sites:
        _train_halves(site, chosen)
    for act in activations(model).values():
        act.requires_grad_(True)
    for module in model.modules():
        if norms and is_norm(module):
            module.requires_grad_(True)
    for name in head_names(model) if head else ():
        model.get_submodule(name).requires_grad_(True)
    return count_parameters(model)


def train_all(model: nn.Module) -> None:
    """Make every parameter trainable, both halves of it; quantized ones can't be.

    Those that the model's own class keeps fixed (Marian's sinusoidal positions) become trainable, too.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for module in model.modules():
        if _trained_half(module) is not None:
            module._trained_half = None  # type: ignore[assignment]
            _remove(FORWARD_PRE_HOOKS.of(module), mask_gradients)
            for parameter in module.parameters(recurse=False):
                _remove(TENSOR_HOOKS.of(parameter) or {}, keep_half)


def _check_halves(halves: Sequence[str]) -> set[str]:
    chosen = {halves} if isinstance(halves, str) else set(halves)
    for half in chosen - set(HALVES):
        raise OptionError(f"unknown half {half!r}; {nearest(half, HALVES)}")
    if not chosen:
        raise OptionError(f"halves must name one of {', '.join(HALVES)} or both, got {halves!r}")
    return chosen


def _train_halves(site: Site, chosen: set[str]) -> None:
    if site.row.gate is not None:
        parts = {"gate": site.anchor.get_submodule(site.row.gate), "up": site.in_proj}
        for half in chosen:
            parts[half].requires_grad_(True)
        return
    site.in_proj.requires_grad_(True)
    if len(chosen) == 1:
        _mask(site.in_proj, next(map(HALVES.index, chosen)))


def _mask(module: Any, half: int) -> None:
    module._trained_half = half
    module.register_forward_pre_hook(mask_gradients)
    mask_gradients(module, ())


def trained_halves(model: nn.Module) -> dict[str, int]:
    """Return which half of a projection alone is trained, by the projection's name."""
    found = ((name, _trained_half(module)) for name, module in model.named_modules())
    return {name: half for name, half in found if half is not None}


def train_halves_again(model: nn.Module, halves: Mapping[str, int]) -> None:
    """Mask gradients as they were when `trained_halves` returned ``halves``, after `train_all`."""
    for name, half in halves.items():
        _mask(model.get_submodule(name), half)


def _trained_half(module: nn.Module) -> int | None:
    """Return the index of the half of a projection that alone is trained; None: all of it, or nothing, is."""
    return module.__dict__.get("_trained_half")


def mask_gradients(linear: AnyLinear, inputs: object) -> None:
    """Let the parameters that ``linear`` has now train one half only, by hooks on their gradients.

    A forward pre-hook: copies of a model (deepcopy, pickle) keep a module's hooks and attributes, but no tensor's.
    """
    half = _trained_half(linear)
    for parameter in linear.parameters(recurse=False):
        if parameter.requires_grad and half is not None and not _has(TENSOR_HOOKS.of(parameter) or {}, keep_half):
            dim = parameter.ndim - 1 if isinstance(linear, Conv1D) else 0
            parameter.register_hook(partial(keep_half, half=half, dim=dim))


def keep_half(gradient: Tensor, *, half: int, dim: int) -> Tensor:
    """Return ``gradient`` with zeros in the other half along ``dim`` (even where that is infinite or NaN)."""
    halves = list(gradient.chunk(2, dim))
    halves[1 - half] = torch.zeros_like(halves[1 - half])
    return torch.cat(halves, dim)


def _has(hooks: Mapping[int, Callable[..., object]], function: Callable[..., object]) -> bool:
    return any(getattr(hook, "func", hook) is function for hook in hooks.values())


def _remove(hooks: MutableMapping[int, Any], function: Callable[..., object]) -> None:
    for key in [key for key, hook in hooks.items() if getattr(hook, "func", hook) is function]:
        del hooks[key]


def masked_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters of which only a half is trained."""
    masked = (module for module in model.modules() if _trained_half(module) is not None)
    return {id(p) for module in masked for p in module.parameters(recurse=False) if p.requires_grad}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return the numbers of all parameters (``total``) and of those that are trained (``trainable``).

    Shared parameters count once, of masked ones a half, and of 4-bit ones the numbers that they stand for.
    """
    masked = masked_parameters(model)
    sizes = [(parameter, _size(parameter)) for parameter in model.parameters()]
    trainable = sum(size // (2 if id(p) in masked else 1) for p, size in sizes if p.requires_grad)
    return {"total": sum(size for _, size in sizes), "trainable": trainable}


def _size(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())
