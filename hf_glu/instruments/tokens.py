"""Which rows of a tensor are tokens that count: the one rule by which every observer leaves padding out.

For the tokens of one forward pass of a stack (an encoder, a decoder), the first of these that says something:

1. the stack's own attention mask, whatever its form (`hf_glu.activation.context.reading`): padding on the left or the
   right, tokens that come after those in a cache, masks of packed texts;
2. for the decoder of an encoder-decoder without one, the labels given to the model around it, where -100 is padding;
3. for a stack that isn't told it, but reads the text of the model around it (FNet; a decoder that is given no ids of
   its own, or the encoder's), that model's mask;
4. none: all tokens count, as they do where texts are packed by their positions, without padding.

A module may be given those tokens as ``[B, T, W]``, in one row ``[B T, W]``, as ``[T, B, W]`` (XLNet, FSMT), in chunks
of the text, several times one after the other (ProphetNet), with padding that the model adds at the end (Longformer),
or without the padding, which the model itself has taken out. Rows that are none of these (pooled, or sent to an expert
by a family's own router) can't be told to tokens: all of them count.

Shapes: B sequences of T tokens in a pass, t of them in one call, W channels, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_glu.activation.context import Reading
from hf_glu.activation.context.hooks import PADDING, TIME_FIRST
from hf_glu.activation.context.passes import Pass

PADDED = (*PADDING, "reformer")  # model types that pad their texts by themselves, at the end
STREAMS = ("prophetnet",)  # model types whose layers are given their texts several times, one after the other
IGNORED = -100  # the label of a position that is padding


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """What the rows of one tensor ``[..., W]`` are.

    Attributes:
        batch: B; 1 where the rows can't be told to sequences.
        length: T, the tokens of the whole pass; 0 where that isn't known.
        start, end: which of the T tokens the tensor begins and ends with.
        time_first: whether it is ``[T, B, W]``.
        valid: ``[B, t]``, False at padding; None: all rows count.
    """

    batch: int
    length: int = 0
    start: int = 0
    end: int = 0
    time_first: bool = False
    valid: Tensor | None = None

    @property
    def last(self) -> bool:
        """Whether the tensor ends with the last token of the pass, so that no chunk of it is to come."""
        return self.end >= self.length

    @property
    def kept(self) -> Tensor | None:
        """Which rows count, in the tensor's order: ``[N]``. None: all do."""
        if self.valid is None:
            return None
        return (self.valid.T if self.time_first else self.valid).reshape(-1)

    def rows(self, x: Tensor) -> Tensor:
        """Return the rows of ``x`` ``[..., W]`` that count: ``[N, W]``, which may share memory with ``x``."""
        flat, kept = x.reshape(-1, x.shape[-1]), self.kept
        return flat if kept is None else flat[kept.to(x.device)]

    def texts(self, x: Tensor) -> Tensor:
        """Return all rows of ``x`` by sequence and time: ``[B, t, W]``."""
        if x.ndim == 3:
            return x.transpose(0, 1) if self.time_first else x
        return x.reshape(self.batch, -1, x.shape[-1])


def place(x: Tensor, now: Pass | None, start: int = 0, *, chunks: bool = False) -> Tokens:
    """Return which tokens the rows of ``x`` ``[..., W]`` are.

    Args:
        x: what a module is given.
        now: the pass that runs, which knows its tokens; None: outside of any.
        start: the first of the tokens, where the module is given them in chunks.
        chunks: whether it is.
    """
    reading, shape = None if now is None else now.reading, list(x.shape[:-1])
    unknown = Tokens(batch=shape[0] if len(shape) > 1 else 1)
    if now is None or reading is None:
        return unknown
    if reading.rows is not None:
        return _inside_expert(reading, shape)
    kind = getattr(getattr(now.stack, "config", None), "model_type", "")
    time_first = len(shape) == 2 and kind in TIME_FIRST
    if time_first:
        shape.reverse()
    if kind in PADDED and len(shape) == 2 and shape[0] == reading.batch:
        reading = reading.padded(shape[1], x.device)
    batch, length = reading.batch, reading.length
    if torch.Size(shape).numel() == batch * length and (len(shape) == 1 or shape[0] == batch):
        start, end = 0, length
    elif kind in STREAMS and len(shape) == 2 and shape[0] == batch and not shape[1] % length:
        once = place(x[:, :length], now)
        return once if once.valid is None else replace(once, valid=once.valid.repeat(1, shape[1] // length))
    elif chunks and len(shape) == 2 and shape[0] == batch and 0 < shape[1] <= length - start:
        end = start + shape[1]
    else:
        return unknown
    valid = reading.valid if reading.valid is not None else reading.labelled
    part = None if valid is None or valid.shape != (batch, length) else valid[:, start:end]
    return Tokens(batch=batch, length=length, start=start, end=end, time_first=time_first, valid=part)


def _inside_expert(reading: Reading, shape: list[int]) -> Tokens:
    """Return which tokens the rows are that one expert is given, where that is known."""
    rows, valid = reading.rows, reading.valid
    assert rows is not None
    known = valid is not None and len(shape) == 1 and shape[0] == len(rows)
    return Tokens(batch=1, valid=valid.flatten()[rows].unsqueeze(0) if known and valid is not None else None)


def told_around(
    stack: Mapping[str, Any], model: Mapping[str, Any], shape: tuple[int, int], *, decoder: bool
) -> Tensor | None:
    """Return what only the model around a stack is told of its tokens: which are no padding, ``[B, T]``, or None.

    Args:
        stack: the arguments of the stack, by name.
        model: those of the outermost model around it.
        shape: B and T of the stack.
        decoder: whether it is the decoder of an encoder-decoder.
    """
    labels, mask = model.get("labels"), model.get("attention_mask")
    if decoder and isinstance(labels, Tensor) and labels.shape == shape:
        return labels != IGNORED
    if not isinstance(mask, Tensor) or mask.shape != shape:
        return None
    own = stack.get("input_ids")
    if decoder:  # its ids are the encoder's where none are given, moved by one token
        own = model.get("decoder_input_ids")
        if own is None:
            return mask.bool() if model.get("decoder_inputs_embeds") is None else None
    return mask.bool() if _same(own, model.get("input_ids")) else None


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
