"""torch's Muon for parameters that hold two matrices, by a method of its own that it doesn't promise to keep."""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import cache
from typing import Any

from torch import Tensor

from hf_glu.compat.of_torch import MUON, MUON_GROUP


@cache
def muon_of_halves() -> Any:
    """Return torch's Muon, told of parameters that are two matrices.

    Raises:
        IncompatibleTransformersError: torch has no Muon (before 2.9), or one that would take both halves as one.
    """
    stock: Any = MUON.find()
    MUON_GROUP.find()

    class GatedMuon(stock):
        """Muon; ``halves``: ids of parameters that are two matrices, with the dimension along which these lie."""

        halves: dict[int, int] = {}  # noqa: RUF012  (a new one is set)

        def _init_group(self, group: MutableMapping[str, Any], *lists: list[Tensor]) -> bool:
            """Fill ``lists`` with parameters, gradients and momenta; in the place of a whole, its halves as views."""
            wholes: tuple[list[Tensor], ...] = tuple([] for _ in lists)
            complex_: bool = super()._init_group(group, *wholes)
            for row in zip(*wholes, strict=True):
                dim = self.halves.get(id(row[0]))
                for target, tensor in zip(lists, row, strict=True):
                    target.extend([tensor] if dim is None else tensor.chunk(2, dim))
            return complex_

    return GatedMuon
