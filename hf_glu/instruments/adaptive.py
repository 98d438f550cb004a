"""What activations with parameters have become in training, measured on data.

With g the pre-activation of a gate, c the mean of the context vectors after the last tokens of the texts, and a_k the
mean of a mix's coefficients over tokens and channels:

    threshold = T c,   slope = 1 + S c,   curve(g) = N(slope (g - threshold)),   N = sum_k a_k phi_k where it is a mix

A channel has its own threshold, slope and curve. What a gate remembers (``stateful_``), or
hears of its router (``kappa_``), is left out of the curve.

Shapes: N tokens, W channels, B texts of a batch, R size of the context vector.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.learnable import mixes
from hf_glu.activation.modulated import ContextSource
from hf_glu.activation.module import innermost
from hf_glu.activation.parameters import activations
from hf_glu.ffn.sites import layer_of
from hf_glu.instruments.curves import Mixing, curve_rows, modulation_of, modulation_row
from hf_glu.instruments.expert_tokens import ExpertTokens
from hf_glu.instruments.recorder import Batch, Call, Watch, run_batches, watching
from hf_glu.instruments.routing import stack_of


def adaptive_activations(model: nn.Module) -> dict[str, nn.Module]:
    """Return the activations of ``model`` whose curve is trained, by name: mixes, modulated ones, xIELU, PReLU."""
    return {name: act for name, act in activations(model).items() if _is_adaptive(act)}


def _is_adaptive(act: nn.Module) -> bool:
    if isinstance(act, ContextSource):
        return False
    return bool(mixes(act)) or modulation_of(act) is not None or any(True for _ in innermost(act)[1].parameters())


def snapshot(model: nn.Module) -> dict[str, nn.Module]:
    """Return copies of the `adaptive_activations` as they are now."""
    return {name: copy.deepcopy(act) for name, act in adaptive_activations(model).items()}


def adaptive_statistics(
    model: nn.Module, batches: Iterable[Batch], before: Mapping[str, nn.Module],
    types: Sequence[str] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return what the `adaptive_activations` of ``model`` do on ``batches``, and would have done ``before``.

    Args:
        model, batches: as of `hf_glu.instruments.activity.activation_statistics`.
        before: a `snapshot`; it is given what those of now are given.
        types: the type of each text, in the batches' order; None: they are all of one.

    Returns:
        Plain data, one row an activation that has run: ``site``, ``layer``, ``stack``, ``activation``, and

        - ``curve``: at ``g``, the mean of the channels' curves ``before`` and ``after``, and of the latter's the
          quantiles ``low`` and ``high`` where channels differ;
        - ``mix``: ``functions``, their mean coefficients ``before`` and ``after``, and the ``spread`` of the latter,
          one standard deviation over tokens and channels, where they differ; None: it is no mix;
        - ``modulation``: a row for all texts, then one for each of the ``types``, see
          `hf_glu.instruments.curves.modulation_row`. None: not modulated, or before the context vector.
    """
    found = adaptive_activations(model)
    watched = [_Watched(name, act, before.get(name)) for name, act in found.items()]
    if not watched:
        return []
    inside = ExpertTokens(model)

    def numbered() -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            for each in watched:
                each.batch = number
            yield batch

    with watching(model, [*inside.watches(), *(watch for each in watched for watch in each.watches(inside))]):
        run_batches(model, numbered())
    return [each.to_dict(types) for each in watched if each.ran]


class _Watched:
    """What is measured of one activation; ``batch`` is the number of the batch that runs."""

    def __init__(self, name: str, act: nn.Module, before: nn.Module | None) -> None:
        self.name, self.act = name, act
        self.stack = stack_of(name)
        self.batch, self.ran = 0, False
        self.mix, self.shift = Mixing.of(act), modulation_of(act)
        self.before = None if before is None else (before, Mixing.of(before))
        self.vectors: dict[int, Tensor] = {}  # by batch, [B, R]

    def watches(self, inside: ExpertTokens) -> Iterator[Watch]:
        """Yield the watches of the activation and of what in it is measured; ``inside`` knows what experts get."""
        yield Watch(module=self.act, see=self.begin)
        if self.mix is not None:
            routed = id(self.act) in inside.acts
            yield Watch(
                module=self.mix.module,
                see=lambda call: self.add(inside.rows(self.act, call.x) if routed else call.tokens.rows(call.x)),
            )
        if self.shift is not None:
            yield Watch(module=self.shift, see=self.read)

    def begin(self, call: Call) -> None:
        """Note that it runs."""
        self.ran = True

    def add(self, x: Tensor) -> None:
        """Add what the mix is given, without padding: ``[N, W]``."""
        x = x.detach().float()
        for mixing in (self.mix, self.before and self.before[1]):
            if mixing is not None:
                mixing.add(x)

    def read(self, call: Call) -> None:
        """Keep the context vectors after the texts' last tokens: padding leaves a running one as it is."""
        reading = self.shift.current() if self.shift is not None else None
        if reading is not None and reading.vector is not None:
            self.vectors[self.batch] = reading.vector[:, -1].float().cpu()

    def to_dict(self, types: Sequence[str] | None) -> dict[str, Any]:
        """Return the row."""
        vectors = torch.cat(list(self.vectors.values())) if self.vectors else None
        mix = None if self.mix is None else self.mix.to_dict(self.before and self.before[1])
        return {
            "site": self.name, "layer": layer_of(self.name), "stack": self.stack,
            "activation": getattr(self.act, "name", type(self.act).__name__),
            "curve": curve_rows((self.act, self.mix), self.before, vectors),
            "mix": mix, "modulation": None if vectors is None else self._modulation(vectors, types),
        }  # fmt: skip

    def _modulation(self, vectors: Tensor, types: Sequence[str] | None) -> list[dict[str, Any]]:
        assert self.shift is not None
        groups: dict[str | None, list[int]] = {None: list(range(len(vectors)))}
        if types is not None and len(types) == len(vectors):
            groups |= {name: [at for at, each in enumerate(types) if each == name] for name in sorted(set(types))}
        return [modulation_row(self.shift, vectors, name, texts) for name, texts in groups.items()]
