"""What gates did, as people's tools read it: by name, as one tensor ``[layer, sequence, token]``, as a pandas frame.

Shapes: L gates, B sequences, T tokens of all forward passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from hf_glu.config.extras import need
from hf_glu.config.showing import Shown, ShownTable, number
from hf_glu.errors import DataError, UnknownNameError, nearest

if TYPE_CHECKING:
    from pandas import DataFrame

MEASURES = ("openness", "state", "shift")


@dataclass(frozen=True, kw_only=True, eq=False)
class GateRecord:
    """What one gate did, each tensor float32 ``[B, T]`` on the CPU, NaN at padding.

    Attributes:
        place: its name, the same in every family: ``layers.3``, ``encoder.layers.3``, ``layers.3.1`` (a second gate of
            that layer), ``layers.3.experts``; ``(2)`` follows where layers share it and it ran a second time.
        layer: name of the FFN or mixer in the model; ``(2)`` as above.
        index, stack: the layer's number, and ``encoder``, ``decoder`` or None.
        kind: of its layout, as ``hf-glu sites`` has it.
        activation: its name.
        openness: mean of sigmoid(g) over the channels; of experts, over those that the token was sent to.
        state: mean of the state that has read the token, of both directions' where it looks both ways; None: no state.
        shift: mean of |z - g|; None: no state.
    """

    place: str
    layer: str
    index: int
    stack: str | None
    kind: str
    activation: str
    openness: Tensor
    state: Tensor | None
    shift: Tensor | None

    @property
    def tokens(self) -> int:
        """How many tokens that are no padding the gate has seen."""
        return int((~self.openness.isnan()).sum())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, None for NaN."""
        keys = ("place", "layer", "index", "stack", "kind", "activation", "tokens")
        about = {key: getattr(self, key) for key in keys}
        return about | {key: _plain(getattr(self, key)) for key in MEASURES}

    def means(self) -> dict[str, float | None]:
        """Return the means over all tokens, None of what isn't there."""
        measures = {key: getattr(self, key) for key in MEASURES}
        return {key: None if value is None else float(value.nanmean()) for key, value in measures.items()}

    def row(self) -> tuple[str, ...]:
        """Return its row of a table."""
        means = [number(value, ".3f" if key == "shift" else ".1%") for key, value in self.means().items()]
        return (self.place, self.layer, self.activation, str(self.tokens), *means)


class Recording(Protocol):
    """What records one gate while the model runs."""

    def records(self) -> Iterator[GateRecord]:
        """Yield a record for each time that the layer runs in a forward pass."""


class RecordedGates(Shown):
    """What `record_gates` gives: all that its gates did up to now.

    ``gates.layers[3]`` and ``gates["layers.3"]`` are one gate's record; `openness`, `state` and `shift` all gates' in
    one tensor; `to_frame` a row for each gate and token.
    """

    def __init__(self, gates: Sequence[Recording]) -> None:
        self._gates = gates

    @property
    def layers(self) -> list[GateRecord]:
        """The gates that have run, in the order of the model's modules.

        Raises:
            DataError: the forward passes had batches of different sizes, which can't be appended.
        """
        return [record for gate in self._gates for record in gate.records()]

    @property
    def places(self) -> list[str]:
        """The names of `layers`."""
        return [record.place for record in self.layers]

    def __getitem__(self, place: str) -> GateRecord:
        """Return the gate of that name, such as ``layers.3`` or ``decoder.layers.3``.

        Raises:
            UnknownNameError: none that has run is called so.
        """
        found = {record.place: record for record in self.layers}
        if place not in found:
            raise UnknownNameError(f"no gate {place!r} has run; {nearest(place, found)}")
        return found[place]

    def tensor(self, measure: str = "openness", *, stack: str | None = None) -> Tensor:
        """Return one measure of all gates: float32 ``[L, B, T]``, in the order of `layers`.

        NaN at padding, at gates that don't have the measure, and after the end of a stack that has read fewer tokens.

        Args:
            measure: ``openness``, ``state`` or ``shift``.
            stack: only the gates of the ``encoder`` or the ``decoder``; None: all.

        Raises:
            UnknownNameError: another measure or stack.
            DataError: the gates have seen different numbers of sequences, as an encoder has where beams are searched.
        """
        if measure not in MEASURES:
            raise UnknownNameError(f"unknown measure {measure!r}; {nearest(measure, MEASURES)}")
        records = self.layers
        if stack is not None:
            stacks = {record.stack for record in records if record.stack}
            records = [record for record in records if record.stack == stack]
            if not records:
                raise UnknownNameError(f"no gate of a stack {stack!r} has run; {nearest(stack, stacks)}")
        if len(sizes := sorted({len(record.openness) for record in records})) > 1:
            raise DataError(
                f"gates that have seen {' and '.join(map(str, sizes))} sequences are no one tensor: give stack="
            )
        length = max((record.openness.shape[1] for record in records), default=0)
        found = torch.full((len(records), sizes[0] if sizes else 0, length), torch.nan)
        for row, record in zip(found, records, strict=True):
            if (values := getattr(record, measure)) is not None:
                row[:, : values.shape[1]] = values
        return found

    @property
    def openness(self) -> Tensor:
        """How open all gates are, ``[L, B, T]``: see `tensor`."""
        return self.tensor("openness")

    @property
    def state(self) -> Tensor:
        """What all gates remember, ``[L, B, T]``: see `tensor`."""
        return self.tensor("state")

    @property
    def shift(self) -> Tensor:
        """How far all gates' states move them, ``[L, B, T]``: see `tensor`."""
        return self.tensor("shift")

    def to_frame(self) -> DataFrame:
        """Return a pandas frame with a row for each gate, sequence and token that is no padding.

        Its columns are ``place``, ``index``, ``stack``, ``activation``, ``sequence``, ``token`` (its number in the
        sequence, padding counted), ``openness``, ``state`` and ``shift`` (NaN: no state).

        Raises:
            MissingPackageError: pandas isn't installed.
        """
        need("pandas", what="to_frame")
        import pandas

        columns = ("place", "index", "stack", "activation", "sequence", "token", *MEASURES)
        parts = [pandas.DataFrame(_columns(record)) for record in self.layers if record.tokens]
        return pandas.concat(parts, ignore_index=True) if parts else pandas.DataFrame(columns=columns)

    def to_dict(self) -> dict[str, Any]:
        """Return `layers` as rows of plain data."""
        return {"rows": [record.to_dict() for record in self.layers]}

    def _table(self) -> ShownTable:
        columns = ("place", "layer", "activation", "#tokens", "#openness", "#state", "#shift")
        try:
            records, title = self.layers, f"{len(self._gates)} gates"
        except DataError as error:
            records, title = [], str(error)
        return ShownTable(title=title, columns=columns, rows=[record.row() for record in records])


def _columns(record: GateRecord) -> dict[str, Any]:
    """Return the columns of one gate's part of a frame."""
    kept = ~record.openness.isnan()
    sequences, tokens = kept.nonzero(as_tuple=True)
    about = {key: getattr(record, key) for key in ("place", "index", "stack", "activation")}
    measures = {key: getattr(record, key) for key in MEASURES}
    nothing = torch.full((len(tokens),), torch.nan)
    values = {key: nothing if value is None else value[kept] for key, value in measures.items()}
    return about | {"sequence": sequences.numpy(), "token": tokens.numpy()} | {k: v.numpy() for k, v in values.items()}


def _plain(values: Tensor | None) -> list[list[float | None]] | None:
    if values is None:
        return None
    return [[None if value != value else value for value in row] for row in values.tolist()]
