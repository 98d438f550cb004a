"""What a variant is and costs, from the shapes of its model alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_glu.activation import registry
from hf_glu.conversion import plan
from hf_glu.errors import ConversionError
from hf_glu.ffn.build import native_gate
from hf_glu.ffn.identify import source_activation
from hf_glu.ffn.sites import Site, find_sites
from hf_glu.instruments.routing import active_parameters
from hf_glu.training.comparing.variants import KEEP, same_name

EQUAL = 0.01  # share by which parameters may differ and be called equal
MULTIPLES = (32, 16, 8, 4, 2, 1)  # of which a width is rather one


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a model.

    Attributes:
        functions: of each FFN its place, whether it is gated, its activation and its width: what it computes.
        ffn_parameters: of all FFNs.
        parameters: of the whole model.
        flops: multiplications and additions by weights of FFNs, for a token.
    """

    functions: tuple[tuple[str, bool, str | None, int], ...]
    ffn_parameters: int
    parameters: int
    flops: int

    @property
    def width(self) -> int | None:
        """Units of an FFN; None where they don't all have as many."""
        widths = {width for *_, width in self.functions}
        return widths.pop() if len(widths) == 1 else None


def shape_of(model: Any) -> Shape:
    """Return the shape of a model as it is; it may be on the meta device."""
    sites = find_sites(model)
    count, total = sum(site.parameters for site in sites), model.num_parameters()
    return Shape(
        functions=tuple((site.name, _gated(site), _function(model, site), site.width) for site in sites),
        ffn_parameters=count,
        parameters=total,
        flops=2 * (count - (total - active_parameters(model))),
    )


def shape_after(model: Any, to: str, width: int | str = KEEP, **choice: Any) -> Shape:
    """Return the shape that a model has after a conversion.

    Raises:
        HfGluError: it can't be converted.
    """
    before, planned = shape_of(model), plan(model, to, width=width, fitted=True, **choice)
    after = {
        step.site.name: (
            step.site.name, step.gated or _gated(step.site),
            native_gate(step.target) if step.site.native else step.target, step.width,
        )
        for step in planned.steps
        if step.changes
    }  # fmt: skip
    cost = planned.to_dict()
    return Shape(
        functions=tuple(_named(after.get(each[0], each)) for each in before.functions),
        ffn_parameters=before.ffn_parameters + cost["ffn_parameters_after"] - cost["ffn_parameters_before"],
        parameters=planned.parameters_after,
        flops=before.flops + cost["flops_per_token_after"] - cost["flops_per_token_before"],
    )


def equal_width(model: Any, to: str, **choice: Any) -> int | str:
    """Return the width at which converted FFNs have as many parameters as before.

    That is ``iso``, a multiple of 64, where parameters of FFNs are equal within 1 % then; else the number that is a
    multiple of as much as can be and equal within that; else the nearest.
    """
    dense, iso = shape_of(model), shape_after(model, to, "iso", **choice)
    best: tuple[float, int | str] = (abs(iso.ffn_parameters / dense.ffn_parameters - 1), "iso")
    if iso.width is None or best[0] <= EQUAL:
        return best[1]
    exact = iso.width * dense.ffn_parameters / iso.ffn_parameters
    for multiple in MULTIPLES:
        width = max(1, round(exact / multiple)) * multiple
        apart = abs(shape_after(model, to, width, **choice).ffn_parameters / dense.ffn_parameters - 1)
        if apart <= EQUAL:
            return width
        best = min(best, (apart, width), key=lambda each: each[0])
    return best[1]


def _gated(site: Site) -> bool:
    return site.native or site.widened


def _function(model: Any, site: Site) -> str | None:
    try:
        name = source_activation(model, site)
    except ConversionError:
        return type(site.act).__name__
    return same_name(name)


def _named(function: tuple[str, bool, str | None, int]) -> tuple[str, bool, str | None, int]:
    place, gated, name, width = function
    entry = registry.find(name)
    return place, gated, same_name((entry.gate or entry.name) if entry and gated else name), width
