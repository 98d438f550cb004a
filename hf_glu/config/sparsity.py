"""Options of FFNs that leave small entries out, as ``config.hf_glu["sparsity"]`` has them (`hf_glu.sparsify`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_glu.config.section import MAX_LAYERS, Entry, is_number
from hf_glu.errors import OptionError, nearest, shown


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to tell which entries of a projection's input count.

    Attributes:
        weighed: whether an entry's score is |x_i| |W_i|, W_i the weights that it is multiplied by; else |x_i|.
        relative: whether a threshold is in standard deviations above the mean score of the token.
        inputs: whether FFNs' inputs are cut, too; else their units only.
    """

    weighed: bool = False
    relative: bool = False
    inputs: bool = True


METHODS = {
    "teal": Method(),
    "wina": Method(weighed=True),
    "spark": Method(weighed=True, relative=True, inputs=False),
}


def check_sparsity(method: str, keep: float) -> None:
    """Raise OptionError for an unknown method, or a share that can't be kept."""
    if not isinstance(method, str) or method not in METHODS:
        raise OptionError(f"unknown method {shown(method)}; {nearest(str(method), METHODS)}")
    if not is_number(keep) or not 0 < keep <= 1:
        raise OptionError(f"keep is the share of an FFN's weights that a token reads, above 0 and up to 1, got {keep}")


@dataclass(frozen=True, kw_only=True)
class SparsityOptions(Entry):
    """Which entries of their inputs the projections of FFNs leave out.

    Attributes:
        method: ``teal``, ``wina`` or ``spark`` (see `hf_glu.sparsify`).
        keep: share of the FFNs' weights that a token reads.
        cuts: thresholds of the FFN in each layer (``"0"``, ``"decoder 3"``), one for each of its projections in the
            order gate, up (or ``[gate | up]``), out; null: the projection is given all of its input.
    """

    key: ClassVar[str] = "sparsity"
    example: ClassVar[dict[str, Any]] = {"method": "wina", "keep": 0.7, "cuts": {"0": [0.1, 0.1, 0.02]}}

    method: str = "wina"
    keep: float = 1.0
    cuts: dict[str, list[float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_sparsity(self.method, self.keep)
        if not isinstance(self.cuts, Mapping) or len(self.cuts) > MAX_LAYERS:
            raise OptionError(f"sparsity cuts must be thresholds by layer such as {self.example['cuts']}")
        for layer, cuts in self.cuts.items():
            known = isinstance(layer, str) and isinstance(cuts, (list, tuple)) and 2 <= len(cuts) <= 3
            if not known or not all(cut is None or is_number(cut) for cut in cuts):
                raise OptionError(f"sparsity cuts of a layer are two or three thresholds, got {shown(cuts)}")
