"""Undoing a conversion that nothing has been done to since."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_glu.activation import build_elementwise, registry
from hf_glu.activation.module import innermost
from hf_glu.activation.wrapped import shifts
from hf_glu.config import GluConfig
from hf_glu.conversion.guard import check_convertible, check_values
from hf_glu.errors import ConversionError, NoSiteError
from hf_glu.layers.context_sites import remove_sources
from hf_glu.layers.fields import write_activation
from hf_glu.layers.linear import set_rows, weight_rows
from hf_glu.layers.sites import Site, find_sites
from hf_glu.layers.source import governing_configs
from hf_glu.registry import core
from hf_glu.routes import find_route


@dataclass(frozen=True, kw_only=True, eq=False)
class _Undo:
    """The dense in-projection and activation that a site gets back."""

    site: Site
    dense: str
    rows: Tensor
    bias: Tensor | None


@torch.no_grad()
def revert(model: Any) -> int:
    """Give ``model`` its dense FFNs back, in place, where its conversion is as it was made.

    Returns:
        The number of sites that were reverted.

    Raises:
        NoSiteError: nothing is converted.
        ConversionError: an FFN was trained, fitted or narrowed, so that no dense one computes the same. Nothing is
            changed then.
    """
    check_convertible(model)
    check_values(model)
    converted = [site for site in find_sites(model) if site.widened]
    if not converted:
        raise NoSiteError(f"{type(model).__name__} has no converted feed-forward network to revert")
    undone = [_undo(model, site) for site in converted]
    configs = {id(config): config for site in converted for config in governing_configs(model, site)}
    for step in undone:
        act = step.site.act
        set_rows(step.site.in_proj, step.rows.clone(), step.bias)
        owner, inner = innermost(act)
        phi = inner if owner is not None and core(str(step.site.activation)) == step.dense else None
        phi = build_elementwise(step.dense) if phi is None else phi
        step.site.set_act(phi.train(act.training))
    remove_sources(model)
    for config in configs.values():
        write_activation(config, undone[0].dense)
        config.hf_glu = None
    return len(undone)


def _undo(model: Any, site: Site) -> _Undo:
    options = GluConfig.of(governing_configs(model, site)[0])
    name, dense = str(site.activation), options.dense_act
    why = f"{site.name} can't be reverted: "
    if dense is None or options.width is not None:
        raise ConversionError(why + ("it is narrower than the dense one was" if dense else "it was never dense"))
    if registry[name].gate is None and registry[name].formula is None:
        raise ConversionError(why + f"{name} has no dense form")
    route = find_route(dense, name)
    rows, bias = weight_rows(site.in_proj), site.in_proj.bias
    s, t, c = route.constants(rows.dtype)
    gate, up = rows.chunk(2)
    old = up / t if t else gate / s
    old_bias = None
    untouched = torch.equal(gate, old * s) and torch.equal(up, old * t if t else torch.zeros_like(up))
    if bias is not None:
        gate_bias, up_bias = bias.chunk(2)
        old_bias = (up_bias - c) / t if t else gate_bias / s
        untouched &= torch.equal(gate_bias, old_bias * s) and torch.equal(up_bias, old_bias * t + c)
        if options.bias and not old_bias.any():
            old_bias = None  # the conversion had added it
    if not untouched or not all(shift.neutral() for shift in shifts(site.act)):
        raise ConversionError(why + f"its weights are not those that {dense} -> {name} gives: it was trained or fitted")
    return _Undo(site=site, dense=dense, rows=old, bias=None if old_bias is None else old_bias.clone())
