"""A modulation while it is on a model: hooks on its gates, and on the stacks around them, which know the tokens.

Nothing of it is global: a model may be steered by several threads at once, each with its own strength.

Shapes: B sequences of T tokens in a pass, W channels.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.context.hooks import after_stack, before_stack, by_name, end_carrying
from hf_glu.activation.context.passes import Held, Pass, current_pass
from hf_glu.errors import OptionError
from hf_glu.ffn.sites import Site
from hf_glu.instruments.hooks import Handle, hook_after, hook_before
from hf_glu.instruments.pre_activations import hook_gate
from hf_glu.instruments.recorder import outermost, stacks_around
from hf_glu.instruments.steering.detecting import Detector
from hf_glu.instruments.steering.generating import ask, stop_asking
from hf_glu.instruments.steering.scope import Scope
from hf_glu.instruments.tokens import place as place_tokens

ALIKE = "steer all tokens alike (one strength, tokens='all', when=None)"
_local = threading.local()  # active: those of this thread


@dataclass(eq=False)
class GateShift:
    """slope (g - threshold) of one gate, by channel.

    Attributes:
        threshold: ``[W]``, at strength 1.
        log_slope: log of the slope at strength 1, ``[W]``; None: the slope is 1.
    """

    threshold: Tensor
    log_slope: Tensor | None = None

    def __call__(self, g: Tensor, strength: float | Tensor) -> Tensor:
        """Return the modulated gate of ``g`` ``[..., W]``, with one strength or ``[..., 1]``."""
        moved = g - (self.threshold.to(g.device) * strength).to(g.dtype)
        if self.log_slope is None:
            return moved
        return moved * (self.log_slope.to(g.device) * strength).exp().to(g.dtype)

    def at(self, strength: float, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return threshold and slope (None: 1) at one strength, with the device and the dtype of ``like``."""
        slope = None if self.log_slope is None else (self.log_slope * strength).exp().to(like)
        return (self.threshold * strength).to(like), slope


@dataclass(eq=False)
class _Steered(Held):
    """One pass that is steered: the strength at each token ``[B, T]``, and where the detector says so."""

    owner: Attached
    amounts: Tensor | None = None
    said: Tensor | None = None

    @property
    def ended(self) -> bool:
        return not self.owner.handles


class Attached:
    """A modulation on a model, until `detach`.

    Args:
        model: the model.
        sites: its gates that are steered, by name.
        shifts: what is done to each.
        scope: to which tokens, how strongly.
        detector, when: only where the detector says ``when``; None: everywhere.
        bound: whether only in the thread that this is called in.
    """

    def __init__(
        self, model: nn.Module, sites: Mapping[str, Site], shifts: Mapping[str, GateShift], scope: Scope, *,
        detector: Detector | None = None, when: str | None = None, bound: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.scope, self.detector, self.when, self.bound = model, scope, detector, when, bound
        self.shifts, self.constants = shifts, dict[Any, tuple[Tensor, Tensor | None]]()
        self.ran, self.elsewhere = False, False
        self.handles: list[Handle] = []
        self.stacks: list[nn.Module] = []
        self.asked: list[nn.Module] = []
        if scope.constant and scope.strength == 0.0:
            return
        try:
            self._hook(sites)
        except BaseException:
            self.detach()
            raise

    def _hook(self, sites: Mapping[str, Site]) -> None:
        """Hook the gates and the stacks around them."""
        model = self.model
        adapter = getattr(model, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False) and self.scope.counts:
            raise OptionError(
                f"{type(adapter).__name__} puts tokens of its own before a text, which masks would count: "
                "steer all tokens, or the last"
            )
        for each in outermost(model) if self.scope.asks else ():
            ask(each)
            self.asked.append(each)
        whole = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        modules = [site.in_proj if site.kind == "mixer" else site.act for site in sites.values()]
        for stack, decodes in stacks_around(model, modules):
            role = "decoder" if decodes else "encoder" if whole else None
            begin = partial(self._begin, role=role)
            self.handles.append(hook_before(stack, begin, with_kwargs=True))
            self.handles.append(hook_after(stack, self._end, always_call=True))
            self.stacks.append(stack)
        self.handles += [hook_gate(site, partial(self._shift, name)) for name, site in sites.items()]
        if self.bound:
            _local.active = (*_active(), self)

    def detach(self) -> None:
        """Take it off; does nothing the second time."""
        while self.handles:
            self.handles.pop().remove()
        while self.asked:
            stop_asking(self.asked.pop())
        while self.stacks:
            end_carrying(self.stacks.pop())
        _local.active = tuple(each for each in _active() if each is not self)
        if self.elsewhere and not self.ran:
            warnings.warn(
                "the model ran in other threads only, which `on` doesn't steer: use modulation.attach(model)",
                stacklevel=4,
            )

    def _begin(
        self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, role: str | None
    ) -> None:
        """Begin a pass of a stack: note how strongly its tokens are steered."""
        if not self._is_on(None) or (self.scope.constant and self.when is None and not stack.training):
            return
        before_stack(stack, args, kwargs or {})
        now = current_pass()
        if now is None:
            return
        amounts = None
        if not self.scope.constant and now.reading is not None:
            amounts = self.scope.amounts(now.reading, by_name(stack, args, kwargs or {}), role=role)
        now.held[self] = _Steered(self, amounts)

    def _end(self, stack: nn.Module, args: Any, output: Any) -> None:
        if self._is_on(current_pass()):
            after_stack(stack, args, output)

    def _is_on(self, now: Pass | None) -> bool:
        """Return whether this thread is steered, or computes again what a steered one has computed."""
        if not self.bound or self in _active() or (now is not None and self in now.held):
            self.ran = True
            return True
        self.elsewhere = True
        return False

    def _shift(self, name: str, g: Tensor) -> Tensor:
        """Return the modulated gate."""
        now = current_pass()
        if not self._is_on(now):
            return g
        shift, strength = self.shifts[name], self.scope.strength
        if self.scope.constant and self.when is None and isinstance(strength, float):
            threshold, slope = self._constant(name, shift, strength, g)
            return g - threshold if slope is None else (g - threshold) * slope
        weights = self._weights(now, name, g)
        return g if weights is None else shift(g, weights)

    def _constant(self, name: str, shift: GateShift, strength: float, g: Tensor) -> tuple[Tensor, Tensor | None]:
        if torch.compiler.is_compiling():
            return shift.at(strength, g)
        key = name, g.device, g.dtype
        if key not in self.constants:
            with torch.inference_mode(False):  # they are for training passes, too
                self.constants[key] = shift.at(strength, g)
        return self.constants[key]

    def _weights(self, now: Pass | None, name: str, g: Tensor) -> Tensor | None:
        """Return the strength at each row of ``g`` ``[..., W]``: ``[..., 1]``; None: the detector hasn't spoken yet."""
        steered = None if now is None else now.held.get(self)
        tokens = place_tokens(g, now)
        if not isinstance(steered, _Steered) or not tokens.length:
            raise OptionError(
                f"{name}: a gate of {list(g.shape)} can't be told to the tokens of a text, which may be in chunks or "
                f"without its padding: {ALIKE}"
            )
        shape = (tokens.batch, tokens.length)
        amounts = torch.full((1, 1), float(self.scope.strength)) if steered.amounts is None else steered.amounts
        amounts = amounts.to(g.device).expand(shape[0], -1)
        amounts = amounts.expand(shape) if amounts.shape[1] == 1 else amounts
        if (missing := shape[1] - amounts.shape[1]) > 0:  # padding that the model adds by itself
            amounts = nn.functional.pad(amounts, (0, missing))
        if self.detector is not None and self.when is not None:
            if name == self.detector.place:
                steered.said = self.detector.says(self.when, tokens.texts(g.detach()))
            if steered.said is None:
                return None
            amounts = amounts * steered.said.to(amounts)
        rows = amounts.T if tokens.time_first else amounts
        if rows.numel() != g.shape[:-1].numel():
            raise OptionError(f"{name}: a gate of {list(g.shape)} has each token more than once: {ALIKE}")
        return rows.reshape(*g.shape[:-1], 1)


def _active() -> tuple[Attached, ...]:
    """Return the modulations that are on in this thread only."""
    found: tuple[Attached, ...] = getattr(_local, "active", ())
    return found
