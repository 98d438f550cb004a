"""Gated FFNs with less memory, and with kernels that compute phi(g) u or its gradient in one pass.

An out-projection keeps its input, the product, for the gradient of its weight. Within `save_memory` it keeps instead
what the product is made of, which the activation keeps anyway.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.fused import find_fused
from hf_glu.activation.gating import Product, product_of
from hf_glu.activation.module import GatedActivation
from hf_glu.errors import NoSiteError, OptionError
from hf_glu.layers.sites import convertible_sites
from hf_glu.registry import registry


def save_memory(model: nn.Module) -> int:
    """Have the gated FFNs of ``model`` keep a third less for the backward pass; return how many do.

    The results stay the same bit by bit. Calling it again changes nothing.

    Raises:
        NoSiteError: there is no FFN that multiplies by an up half with an activation of hf_glu's.
    """
    sites = [site for site in convertible_sites(model) if site.widened and site.kind == "dense"]
    if not sites:
        raise NoSiteError(f"{type(model).__name__} has no gated FFN of hf_glu's: hf_glu.convert(model, 'swiglu')")
    for site in sites:
        watch_out(site.out_proj)
    return len(sites)


def fuse(model: nn.Module, *, device: str | None = None) -> int:
    """Have the gates of ``model`` computed in one pass while it trains; return how many are.

    Kernels are Liger's on an accelerator, where ``liger-kernel`` is installed and has the activation (SiLU, tanh GELU),
    else made by torch's compiler when they are first needed. On a CPU values stay the same bit by bit, gradients up to
    rounding. Experts, and gates with parameters of their own, go on as they are. Calling it again changes nothing.

    Args:
        model: whose gates.
        device: the type of device that it will train on; None: where it is.

    Raises:
        NoSiteError: there is no such gate.
        OptionError: there are neither such kernels nor a compiler.
    """
    gates = [module for module in model.modules() if isinstance(module, GatedActivation) and is_fusible(module)]
    if not gates:
        raise NoSiteError(f"{type(model).__name__} has no gated FFN of hf_glu's: hf_glu.convert(model, 'swiglu')")
    device = device or next(iter(model.parameters())).device.type
    kernels = [partial(find_fused, str(registry[act.name].gate)) for act in gates]
    for act, find in zip(gates, kernels, strict=True):
        if find(device) is None:
            raise OptionError(f"hf_glu.fuse has no kernels for {act.name} on {device}, and torch finds no compiler")
    for act, find in zip(gates, kernels, strict=True):
        act.fused = find
    return len(gates)


def is_fusible(act: GatedActivation) -> bool:
    """Tell whether an activation is phi(g) u with a phi that has no parameters."""
    return act.phi is not None and next(iter(act.phi.parameters()), None) is None


def watch_out(out_proj: nn.Module) -> None:
    """Have one out-projection do so."""
    if begin not in out_proj._forward_pre_hooks.values():
        out_proj.register_forward_pre_hook(begin)
        out_proj.register_forward_hook(end, always_call=True)


def begin(out_proj: nn.Module, args: tuple[Any, ...]) -> None:
    """Swap the product, as it is about to be kept, for what it is made of."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    made = product_of(args[0])
    if made is not None:
        swap = _Swap(args[0], made)
        hooks = torch.autograd.graph.saved_tensors_hooks(swap.pack, _unpack)
        hooks.__enter__()
        out_proj.__dict__["_hf_glu_swap"] = hooks, swap


def end(out_proj: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Keep everything again."""
    hooks, swap = out_proj.__dict__.pop("_hf_glu_swap", (None, None))
    if hooks is not None:
        hooks.__exit__(None, None, None)
        swap.product = None  # the graph keeps what packs for it, and so would keep the product


class _Swap:
    """Packs what an out-projection keeps."""

    def __init__(self, product: Tensor, made: Product) -> None:
        self.product: Tensor | None = product
        self.made = made

    def pack(self, kept: Tensor) -> Any:
        """Return what the product is made of in its place, and all else as it is."""
        product = self.product
        assert product is not None
        same = kept.data_ptr() == product.data_ptr() and kept.numel() == product.numel() and kept.is_contiguous()
        return (self.made, kept.shape) if same else kept


def _unpack(kept: Any) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept[0]().view(kept[1])
