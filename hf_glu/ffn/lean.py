"""Gated FFNs that keep less for the backward pass, and kernels that compute phi(g) u or its gradient in one pass.

An out-projection keeps its input, the product, for the gradient of its weight. With `save_memory` it keeps instead what
the product was made of, which the activation keeps anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.kernels.compiled import has_compiler
from hf_glu.activation.kernels.product import Product, product_of
from hf_glu.activation.module import OwnedActivation, OwnedModule
from hf_glu.errors import NoSiteError, OptionError
from hf_glu.ffn.experts.ffn import find_experts
from hf_glu.ffn.experts.group import banks_of
from hf_glu.ffn.sites import convertible_sites, is_adapted
from hf_glu.ffn.tiled import tile_ffns
from hf_glu.inplace import InPlace, become


def save_memory(model: nn.Module, *, tile: int | None = None) -> int:
    """Make the FFNs of ``model`` keep less for the backward pass; return how many do.

    A gate keeps ``[g | u]`` only, a third less than the formula; a mix of activations, or a modulation, its input only.
    They are computed again in the backward pass, by one function of their own each, with fresh gradients; where that
    might give anything else (an activation that isn't known exactly, hooks, transforms of torch), the formula is kept.
    Values stay the same bit by bit, gradients up to rounding. Experts of ours keep their rows and pre-activations only,
    half of what they keep else, one expert after the other (values up to rounding). Calling it again changes nothing.

    Args:
        model: whose FFNs.
        tile: for long texts: FFNs that are a module by themselves (Llama's, GPT-2's, T5's), stock ones, too, compute so
            many tokens at a time, in both passes, and keep their input only. Values are then the same up to rounding.

    Raises:
        NoSiteError: there is no FFN with an activation of hf_glu's; with ``tile``, no FFN at all.
        OptionError: ``tile`` is no number of tokens, or there is no FFN that can be computed so.
    """
    experts = find_experts(model)
    every = [site for site in convertible_sites(model) if site.activation or tile is not None]
    tiled = [] if tile is None or not every else tile_ffns(every, tile)
    sites = [site for site in every if site.activation and site not in tiled]
    if not every and (tile is not None or not experts):  # experts aren't computed by tiles
        what = (
            "call save_memory before PEFT wraps projections" if is_adapted(model) else "hf_glu.convert(model, 'swiglu')"
        )
        raise NoSiteError(f"{type(model).__name__} has no gated FFN of hf_glu's: {what}")
    for site in sites:
        keep_less(site.act, site.out_proj if site.widened else None)
    for bank in (bank for ffn in experts.values() for bank in banks_of(ffn)):
        bank.saves_memory = True
    return len(sites) + len(tiled) + len(experts)


def keep_less(act: nn.Module, out_proj: nn.Module | None) -> None:
    """Make an activation, and the out-projection that takes what it gives, compute again what they need not keep."""
    for module in act.modules():
        if isinstance(module, OwnedModule):
            module.saves_memory = True
    if out_proj is not None:
        become(out_proj, LeanOut)


def fuse(model: nn.Module, *, device: str | None = None) -> int:
    """Compute the activations of ``model`` in one pass, in training and at inference; return how many are.

    Those are gates phi(g) u, mixes (``learnable_N``, ``moa_N``) and modulated gates, in FFNs and in experts of ours,
    whose functions are known exactly. Kernels are made by torch's compiler when they are first needed; of gates on an
    accelerator they are Liger's, where ``liger-kernel`` is installed and has the activation (SiLU, tanh GELU). On a CPU
    a gate's values stay the same bit by bit; a mix's and a modulation's do up to rounding, as gradients do. Calling it
    again changes nothing.

    Args:
        model: whose activations.
        device: the type of device that it will run on; None: where it is.

    Raises:
        NoSiteError: there is no activation of hf_glu's.
        OptionError: there are no kernels for any of them, or no compiler.
    """
    device = device or next(iter(model.parameters())).device.type
    acts = [module for module in model.modules() if isinstance(module, OwnedActivation)]
    fusible = [act for act in acts if act.is_fusible(device)]
    if not acts:
        raise NoSiteError(f"{type(model).__name__} has no FFN of hf_glu's: hf_glu.convert(model, 'swiglu')")
    if not fusible:
        why = f"no kernels for {acts[0].name} on {device}" if has_compiler(device) else f"no compiler for {device}"
        raise OptionError(f"hf_glu.fuse has {why}: leave it out")
    for act in fusible:
        act.is_fused = True
    return len(fusible)


class LeanOut(InPlace):
    """What an out-projection becomes that keeps how its input was made in place of its input."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Apply the projection."""
        run: Callable[..., Any] = super().forward  # type: ignore[misc]
        made = None if torch.compiler.is_compiling() else product_of(x)
        if made is None or not torch.is_grad_enabled() or not made.is_unchanged(x):
            return run(x, *args, **kwargs)
        swap = _Swap(x, replace(made, stamp=None))  # which the graph has no use for
        try:
            with torch.autograd.graph.saved_tensors_hooks(swap.pack, _unpack):
                return run(x, *args, **kwargs)
        finally:
            swap.product = None  # the graph keeps what packs for it, and so would keep the product


class _Swap:
    """Packs what an out-projection keeps."""

    def __init__(self, product: Tensor, made: Product) -> None:
        self.product: Tensor | None = product
        self.made = made

    def pack(self, kept: Tensor) -> Any:
        """Return how the product was made in its place, and all else as it is."""
        product = self.product
        assert product is not None
        same = kept.data_ptr() == product.data_ptr() and kept.numel() == product.numel() and kept.is_contiguous()
        return (self.made, kept.shape) if same and kept.dtype == product.dtype else kept


def _unpack(kept: Any) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept[0]().view(kept[1])
