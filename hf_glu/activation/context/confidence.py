"""What a router says of the rows that an expert is given: an argument of its activation, kept by nobody.

Shapes: N rows, which are pairs of token and expert; W units.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Confidence(NamedTuple):
    """How sure the router is.

    Attributes:
        scores: ``[N]``, with their gradient; or a number, of all rows, where no gradient is asked for.
        experts: whose rows they are, by its place among those that share the activation: of each row ``[N]``, or one
            number for all.
        response: the expert's a ``[W]`` (see `hf_glu.activation.kappa`), where the module's own doesn't count: in what
            autograd knows as one function, such as `hf_glu.ffn.experts.loop.ExpertLoop`.
    """

    scores: Tensor | float
    experts: Tensor | int
    response: Tensor | None = None
