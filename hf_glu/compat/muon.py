"""torch's Muon for parameters that hold two matrices, by a method of its own that it doesn't promise to keep."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from hf_glu.compat.of_torch import MUON, MUON_GROUP

_STOCK: Any = MUON.find_or(torch.optim.Optimizer)  # so that the class has a name that it is pickled by in any torch


class GatedMuon(_STOCK):
    """Muon; a group's ``halves``: its parameters are two matrices each along that dimension.

    ``transposed``: they are stored as ``[in, out]``.
    """

    def _init_group(self, group: MutableMapping[str, Any], *lists: list[Tensor]) -> bool:
        """Fill ``lists`` with parameters, gradients and momenta as ``[out, in]``; in the place of a whole, its halves.

        All are views.
        """
        wholes: tuple[list[Tensor], ...] = tuple([] for _ in lists)
        complex_: bool = super()._init_group(group, *wholes)
        dim, transposed = group.get("halves"), group.get("transposed", False)
        for target, tensors in zip(lists, wholes, strict=True):
            parts = [part for each in tensors for part in ([each] if dim is None else each.chunk(2, dim))]
            target.extend(part.T if transposed else part for part in parts)
        return complex_


def muon_of_halves() -> Any:
    """Return torch's Muon, told of groups whose parameters are two matrices.

    Raises:
        IncompatibleTransformersError: torch has no Muon (before 2.9), or one that would take both halves as one.
    """
    MUON.find()
    MUON_GROUP.find()
    return GatedMuon
