"""Shifting a model's gates by hand: stricter or looser at inference, and one text's context vector for another.

Shapes: B sequences, T tokens, R size of the context vector.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hf_glu.activation.context import Reading
from hf_glu.activation.context.hooks import TIME_FIRST
from hf_glu.activation.modulated import ContextSource
from hf_glu.config.glu import GluConfig
from hf_glu.config.layers import check_layers, selected
from hf_glu.errors import NoSiteError, OptionError, nearest
from hf_glu.ffn.build import check_selection
from hf_glu.ffn.expert_sites import own_sites
from hf_glu.ffn.experts import ExpertFFN
from hf_glu.ffn.experts.group import banks_of
from hf_glu.instruments.adapted import gate_sites
from hf_glu.instruments.hooks import Handle, hook_after
from hf_glu.instruments.pre_activations import hook_activation, hook_gate
from hf_glu.instruments.probe import evaluating
from hf_glu.instruments.recorder import Call, Watch, outermost, watching
from hf_glu.instruments.steering.generating import ask, stop_asking
from hf_glu.instruments.steering.scope import rows_for

# preset -> threshold, slope
PRESETS = {"strict": (0.3, 1.2), "loose": (-0.3, 0.9)}
Amount: TypeAlias = float | Tensor


@contextmanager
def modulation(
    model: nn.Module, preset: str | None = None, *, threshold: Amount = 0.0, slope: Amount = 1.0, layers: Any = None,
    vector: Tensor | None = None,
) -> Iterator[None]:  # fmt: skip
    """Give every gate of ``model`` slope (g - threshold) in place of g, within the block.

    Works for any model whose FFNs hf_glu knows, dense ones included, and for Mamba's mixers; on top of what a modulated
    activation does itself.

    Args:
        model: the model.
        preset: ``strict`` (threshold 0.3, slope 1.2) or ``loose`` (-0.3, 0.9).
        threshold, slope: numbers, or one for each sequence of the batch, ``[B]`` (for each text, where beams are
            searched).
        layers: which layers (see `hf_glu.config.layers`); None: all.
        vector: what `context_vector` gave for another text, to be used instead of this one's: ``[1 or B, 1 or T, R]``.

    Raises:
        OptionError: an unknown preset, layers that the model doesn't have, or amounts or a vector of another shape.
        NoSiteError: no gate, or no context vector to replace.
    """
    if preset is not None:
        if preset not in PRESETS:
            raise OptionError(f"unknown preset {preset!r}; {nearest(preset, PRESETS)}")
        threshold, slope = PRESETS[preset]
    for amount in (threshold, slope):
        if isinstance(amount, Tensor) and amount.ndim > 1:
            raise OptionError(f"threshold and slope are numbers or [batch], got {list(amount.shape)}")
    sources = _sources(model) if vector is not None else []
    handles: list[Handle] = _hooks(model, threshold, slope, layers)
    if vector is not None:
        handles += [hook_after(source, partial(_instead, vector=vector)) for source in sources]
    several = any(isinstance(each, Tensor) and each.ndim for each in (threshold, slope, vector))
    asked = outermost(model) if several else []  # for prompts, whose beams share a row
    for each in asked:
        ask(each)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for each in asked:
            stop_asking(each)


@torch.no_grad()
def context_vector(model: nn.Module, **inputs: Any) -> Tensor:
    """Return the context vector after the last token of each sequence: ``[B, 1, R]``.

    Of a model with an encoder and a decoder, the decoder's.

    Args:
        model: with modulated activations.
        inputs: of its forward.

    Raises:
        NoSiteError: it has none.
    """
    found: list[Tensor] = []
    source, caller = _sources(model)[-1], threading.get_ident()

    def see(call: Call) -> None:
        if threading.get_ident() == caller:
            found.append(_at_last(call.output, source.current()))

    with watching(model, [Watch(module=source, see=see, after=True)]), evaluating(model):
        model(**inputs)
    return found[-1]


def _at_last(vector: Tensor, reading: Reading | None) -> Tensor:
    """Return the vector at the last token of each sequence that is no padding: ``[B, 1, R]``."""
    valid = None if reading is None else reading.valid
    if valid is None or vector.shape[1] == 1:
        return vector[:, -1:]
    last = valid.shape[1] - 1 - valid.flip(1).int().argmax(1)
    return vector.gather(1, last.view(-1, 1, 1).expand(-1, 1, vector.shape[2]))


def _sources(model: nn.Module) -> list[ContextSource]:
    found = [module for module in model.modules() if isinstance(module, ContextSource)]
    if not found:
        raise NoSiteError(f"{type(model).__name__} has no context vector: hf_glu.convert(model, 'modulated_swiglu')")
    return found


def _hooks(model: nn.Module, threshold: Amount, slope: Amount, layers: Any) -> list[Handle]:
    neutral = not isinstance(threshold, Tensor) and not isinstance(slope, Tensor) and (threshold, slope) == (0.0, 1.0)
    if neutral:
        return []
    sites, experts = gate_sites(model), own_sites(model)
    if not sites and not experts:
        raise NoSiteError(f"{type(model).__name__} has no gate that hf_glu knows")
    spec = check_layers(layers)
    check_selection([*sites, *experts], GluConfig(layers=spec))
    chosen = [site for site in (*sites, *experts) if selected(spec, site.layer, site.stack)]
    if not chosen:
        raise OptionError(f"layers={layers!r} selects none of {', '.join(site.name for site in (*sites, *experts))}")
    kind = getattr(getattr(model, "config", None), "model_type", "")
    shift = partial(_shift, threshold=threshold, slope=slope, axis=int(kind in TIME_FIRST))
    handles: list[Handle] = []
    for site in chosen:
        if isinstance(site.anchor, ExpertFFN):
            acts = [act for bank in banks_of(site.anchor) for act in bank.acts]
            handles += [hook_activation(act, shift) for act in acts]
        else:
            handles.append(hook_gate(site, shift))
    return handles


def _instead(source: nn.Module, args: Any, own: Tensor, *, vector: Tensor) -> Tensor:
    """Return the vector that takes the place of a source's ``own``."""
    size, length = own.shape[-1], args[0].shape[1]
    if vector.ndim != 3 or vector.shape[2] != size or vector.shape[1] not in (1, length):
        raise OptionError(f"vector is [batch, 1 or {length}, {size}] here, got {list(vector.shape)}")
    return vector if len(vector) == 1 else rows_for(vector, len(own), "context vectors")


def _shift(gate: Tensor, *, threshold: Amount, slope: Amount, axis: int) -> Tensor:
    return (gate - _per_sequence(threshold, gate, axis)) * _per_sequence(slope, gate, axis)


def _per_sequence(amount: Amount, gate: Tensor, axis: int) -> Amount:
    """Return amounts as a gate ``[B, T, W]``, or ``[T, B, W]`` where ``axis`` is 1, is multiplied by them."""
    if not isinstance(amount, Tensor) or amount.ndim == 0:
        return amount
    if gate.ndim != 3:
        raise OptionError(f"{len(amount)} amounts can't be told to the sequences of a gate {list(gate.shape)}")
    amount = rows_for(amount, gate.shape[axis], "amounts")
    return amount.to(gate).view([-1 if at == axis else 1 for at in range(3)])
