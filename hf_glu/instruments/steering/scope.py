"""How strongly each token of a forward pass is steered.

Shapes: B sequences of T tokens in a pass, P texts of a prompt, K tokens of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hf_glu.activation.context.hooks import cache_of
from hf_glu.activation.context.reading import Reading
from hf_glu.activation.context.states import tokens_seen
from hf_glu.errors import OptionError, UnknownNameError, nearest, shown
from hf_glu.instruments.steering.generating import prompt

Strength: TypeAlias = float | Sequence[float] | Tensor
Chosen: TypeAlias = str | Sequence[Sequence[bool]] | Tensor
TOKENS = ("all", "generated", "last")
STRENGTHS = "strength is a number, or one for each sequence"
MASK = "tokens is all, generated, last, or a mask of positions [batch, tokens] of booleans"


@dataclass(frozen=True, kw_only=True, eq=False)
class Scope:
    """Which tokens are steered, and how strongly.

    Attributes:
        strength: one number, or one for each sequence ``[P]``.
        tokens: ``all``, ``generated``, ``last``, or a mask of positions ``[P, K]``.
    """

    strength: float | Tensor
    tokens: str | Tensor = "all"

    @classmethod
    def read(cls, strength: Strength, tokens: Chosen) -> Scope:
        """Return what a user said.

        Raises:
            OptionError, UnknownNameError: a strength or tokens that can't be.
        """
        if isinstance(strength, bool):
            raise OptionError(f"{STRENGTHS}, got {strength}")
        values = _tensor(strength, STRENGTHS).float()
        if values.ndim > 1 or not values.isfinite().all():
            raise OptionError(f"strengths are finite numbers, [batch] where there are several, got {shown(strength)}")
        if isinstance(tokens, str) and tokens not in TOKENS:
            raise UnknownNameError(f"unknown tokens {tokens!r}; {nearest(tokens, TOKENS)}; or a mask [batch, tokens]")
        if not isinstance(tokens, str):
            tokens = _tensor(tokens, MASK)
            if tokens.ndim != 2 or tokens.is_floating_point():
                raise OptionError(f"{MASK}, got {str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}")
        return cls(strength=float(values) if values.ndim == 0 else values, tokens=tokens)

    @property
    def constant(self) -> bool:
        """Whether all tokens are steered alike."""
        return isinstance(self.strength, float) and isinstance(self.tokens, str) and self.tokens == "all"

    @property
    def counts(self) -> bool:
        """Whether it goes by the places of tokens in their text."""
        return not isinstance(self.tokens, str) or self.tokens == "generated"

    @property
    def asks(self) -> bool:
        """Whether it needs to know what a prompt was, where the model generates."""
        return not self.constant and (isinstance(self.strength, Tensor) or self.tokens != "last")

    def amounts(self, reading: Reading, inputs: Mapping[str, Any], *, role: str | None) -> Tensor:
        """Return the strength at each token of a pass, 0 where it isn't steered: ``[B, T]``, float32.

        Args:
            reading: the tokens of the pass.
            inputs: the arguments of its stack, by name.
            role: ``encoder`` or ``decoder`` of an encoder-decoder; None: of another model.

        Raises:
            OptionError: strengths or a mask of another number of sequences, or generated tokens outside of `generate`.
        """
        shape = (reading.batch, reading.length)
        strength = self.strength
        each = torch.full((1, 1), strength) if isinstance(strength, float) else strength.view(-1, 1)
        each = each if isinstance(strength, float) else rows_for(each, shape[0], "strengths")
        return each.expand(shape) * self._chosen(reading, inputs, role).to(each)

    def _chosen(self, reading: Reading, inputs: Mapping[str, Any], role: str | None) -> Tensor:
        """Return which tokens are steered, ``[B or 1, T]``."""
        length = reading.length
        if isinstance(self.tokens, Tensor):
            if role == "decoder":  # the mask is of the text, which the encoder reads
                return torch.zeros(1, length)
            mask, start = rows_for(self.tokens, reading.batch, "rows of the mask"), _start(inputs)
            chosen = mask.new_zeros(len(mask), length)
            part = mask[:, start : start + length]
            chosen[:, : part.shape[1]] = part
            return chosen != 0
        if self.tokens == "last":
            return _last(reading)
        if self.tokens == "all" or role == "decoder":  # all of whose tokens are generated
            return torch.ones(1, length)
        if role == "encoder":
            return torch.zeros(1, length)
        known = prompt()
        if known is None:
            raise OptionError("tokens='generated' are those of model.generate(...), and this is another forward pass")
        return (torch.arange(length) + _start(inputs) >= known[1]).unsqueeze(0)


def _start(inputs: Mapping[str, Any]) -> int:
    """Return how many tokens came before those of a pass.

    Raises:
        OptionError: its cache doesn't know.
    """
    cache = cache_of(inputs)
    seen = tokens_seen(cache)
    if seen is None and cache is not None and getattr(cache, "layers", None):
        raise OptionError(f"{type(cache).__name__} doesn't say which tokens it has: steer all tokens, or the last")
    return seen or 0


def _tensor(given: Any, what: str) -> Tensor:
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{what}, got {shown(given)}") from error


def rows_for(given: Tensor, batch: int, what: str) -> Tensor:
    """Return a row of ``given`` ``[P, ...]`` for each sequence: where a model generates, a text's beams are neighbours.

    Raises:
        OptionError: there are other sequences, ``batch`` of them.
    """
    known = prompt()
    if known is not None and len(given) == known[0] and batch % len(given) == 0:
        return given.repeat_interleave(batch // len(given), dim=0)
    if len(given) != batch:
        raise OptionError(f"{len(given)} {what} for a batch of {batch}")
    return given


def _last(reading: Reading) -> Tensor:
    """Return each sequence's last token that is no padding: ``[B or 1, T]``."""
    at = torch.arange(reading.length)
    if reading.valid is None:
        return (at == reading.length - 1).unsqueeze(0)
    valid = reading.valid.cpu()
    return at == (valid * at).amax(1, keepdim=True)
