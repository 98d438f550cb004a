"""The modules behind our names: stateless unless their elementwise part has parameters."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_glu.activation.context.confidence import Confidence
from hf_glu.activation.elementwise import LAYOUT_FREE, build_elementwise
from hf_glu.activation.kernels.autodiff import needs_formula
from hf_glu.activation.kernels.formulas import gated, split_gate_up
from hf_glu.activation.kernels.fused import find_fused
from hf_glu.activation.kernels.known import is_bare, is_known
from hf_glu.activation.kernels.product import by_layout, recomputed_gate
from hf_glu.activation.kernels.special import FORMULAS
from hf_glu.config.registry import registry

if TYPE_CHECKING:
    from hf_glu.config.glu import GluConfig


class OwnedModule(nn.Module):
    """A module that initialises itself: the plugin calls `reset_parameters` in Transformers' initialisation passes.

    Constructors run on the meta device, so values are written there and nowhere else, with
    ``transformers.initialization``, which leaves alone what a checkpoint has loaded.

    Attributes:
        saves_memory: whether the backward pass computes again what need not be kept (`hf_glu.save_memory`).
        is_fused: whether kernels of one pass are used while it trains, where there are such (`hf_glu.fuse`).
    """

    saves_memory: bool = False
    is_fused: bool = False

    def reset_parameters(self) -> None:
        """Write the initial value of every parameter and buffer below this module."""
        raise NotImplementedError


class OwnedActivation(OwnedModule):
    """An activation of ours.

    Attributes:
        name: its name in the registry.
        gated: whether it takes ``[g | u]`` rather than ``x``.
        elementwise: whether a channel's value depends on that channel alone.
    """

    name: str
    gated: bool
    elementwise: bool = True

    def configure(self, options: GluConfig, width: int) -> None:
        """Take the model's options, and make what is per channel ``width`` wide; called before the initialisation."""

    def is_fusible(self, device: str) -> bool:
        """Return whether there are kernels of one pass for it on a type of device (`hf_glu.fuse`)."""
        return False


class GatedActivation(OwnedActivation):
    """phi(g) * u, or the entry's own formula.

    Shapes: input ``[..., 2 * width]`` = ``[g | u]``, output ``[..., width]``.

    Args:
        name: a gated name of the registry.
        phi: the elementwise part to use instead of a fresh one (a conversion hands on the model's own).
    """

    gated = True

    def __init__(self, name: str, phi: nn.Module | None = None) -> None:
        super().__init__()
        entry = registry[name]
        self.name = name
        self.formula = entry.formula
        self.phi = None
        self.contiguous = entry.gate not in LAYOUT_FREE
        if entry.formula is None:
            assert entry.gate is not None
            self.phi = build_elementwise(entry.gate) if phi is None else phi

    def forward(self, x: Tensor, confidence: Confidence | None = None) -> Tensor:
        """Apply the gated activation; ``confidence`` is what the router says, in an expert."""
        if self.formula is not None:
            return self.formula(*split_gate_up(x))
        assert self.phi is not None
        if confidence is not None:  # what the innermost shift gives is no view
            return gated(x, partial(self.phi, confidence=confidence))
        contiguous = self.contiguous and by_layout(self.phi, x)
        if (self.saves_memory or self.is_fused) and self.recomputes(x):
            fused = find_fused(self.phi, x.device.type) if self.is_fused else None
            if fused or self.saves_memory:
                return recomputed_gate(self.phi, x, contiguous=contiguous, fused=fused, stamped=self.saves_memory)
        return gated(x, self.phi, contiguous=contiguous)

    def recomputes(self, x: Tensor) -> bool:
        """Return whether there will be a backward pass, and phi may be computed again there."""
        assert self.phi is not None
        graded = torch.is_grad_enabled() and x.requires_grad and x.numel() > 0 and x.shape[-1] % 2 == 0
        return graded and not needs_formula(x) and is_known(self.phi)

    def is_fusible(self, device: str) -> bool:
        """Return whether it is phi(g) u with a phi that has kernels."""
        return self.phi is not None and find_fused(self.phi, device) is not None

    def configure(self, options: GluConfig, width: int) -> None:
        """Hand the options on to the elementwise part."""
        if isinstance(self.phi, OwnedActivation):
            self.phi.configure(options, width)

    def reset_parameters(self) -> None:
        """Give a parametric elementwise part (PReLU, xIELU) the values that its own constructor gives."""
        if self.phi is not None and not isinstance(self.phi, OwnedModule):
            gate = registry[self.name].gate
            assert gate is not None
            reset_elementwise(self.phi, gate)

    def extra_repr(self) -> str:
        """Show the name in the model's printout."""
        return f"{self.name!r}"


def is_recomputable(act: nn.Module) -> bool:
    """Return whether an activation is known exactly, has no parameters, and may be computed again."""
    if type(act) is not GatedActivation:
        return is_known(act)
    formula = act.formula in FORMULAS if act.phi is None else is_known(act.phi)
    return formula and is_bare(act)


def levels(act: nn.Module) -> Iterator[tuple[nn.Module | None, nn.Module]]:
    """Yield an activation and what is inside of it, from the outside in, each with the module that holds it."""
    owner: nn.Module | None = None
    while True:
        yield owner, act
        if not isinstance(act, OwnedActivation) or not isinstance(getattr(act, "phi", None), nn.Module):
            return
        owner, act = act, act.phi  # type: ignore[assignment]


def innermost(act: nn.Module) -> tuple[nn.Module | None, nn.Module]:
    """Return the elementwise part inside of an activation's wrappers, and the module that holds it (None: nothing)."""
    return list(levels(act))[-1]


def reset_elementwise(module: nn.Module, name: str) -> None:
    """Give the parameters and buffers of an elementwise module the values that its own constructor gives."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if not tensors:
        return
    with torch.device("cpu"):
        fresh = build_elementwise(name)
    values = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
    for key, tensor in tensors:
        init.copy_(tensor, values[key])
