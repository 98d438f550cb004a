"""Giving converted T5 models the layout of T5 v1.1, which stock Transformers has itself."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_glu.conversion.checks import check_values
from hf_glu.conversion.engine import make_plan
from hf_glu.conversion.fit.fitting import Fit
from hf_glu.conversion.forms import ConfigEntry, governed
from hf_glu.conversion.routes import ROUNDING, Route
from hf_glu.conversion.steps import Change, Rows, Step
from hf_glu.conversion.work import Work
from hf_glu.errors import ConversionError, NoSiteError
from hf_glu.ffn.build import native_gate
from hf_glu.ffn.config_fields import GATED_PREFIX, sync_derived, width_field
from hf_glu.ffn.identify import governing_configs
from hf_glu.ffn.linear import set_rows, weight_rows
from hf_glu.ffn.sites import Site, find_sites

DENSE, GATED = "DenseActDense", "DenseGatedActDense"
# stock's "gated-gelu" is the tanh form, and nothing there means the other one
NATIVE_NAMES = {"gelu_new": "gelu", "gelu": None}


def to_native(model: Any) -> int:
    """Turn the converted FFNs of a T5 into the stock gated ones (``wi_0``, ``wi_1``, ``wo``), in place.

    The model computes the same afterwards, its config says such as ``feed_forward_proj="gated-silu"``, and it loads
    without hf_glu. The stock layout has no bias: convert with ``bias=False`` and calibration data.

    Returns:
        The number of FFNs.

    Raises:
        NoSiteError: the model has no converted T5 FFN.
        ConversionError: an FFN that the stock layout can't hold; nothing is changed then.
    """
    return len(make_plan(model, ToNative()).apply(check=False).sites)


@dataclass(frozen=True, kw_only=True)
class ToNative(Change):
    """Give a converted T5 the layout of T5 v1.1: one field of the config says that of all FFNs."""

    of_all = True
    replaces = True

    def choose(self, model: nn.Module, layers: Any, exclude: str | None) -> list[Site]:
        check_values(model)
        return dense_t5_sites(model)

    def rows(self, model: nn.Module, sites: list[Site]) -> tuple[Step, ...]:
        _activation(sites)
        return super().rows(model, sites)

    def plan(self, model: nn.Module, site: Site) -> Step:
        _check_bias(site)
        name, bias = str(site.activation), site.in_proj.bias
        after = site.parameters - (0 if bias is None else bias.numel())
        route = Route(name="the layout of T5 v1.1", promise=ROUNDING)
        return Step.at(site, self, name, name, route, parameters_after=after)

    def entries(self, model: nn.Module, planned: Rows) -> list[ConfigEntry]:
        sites = [step.site for step in planned.steps]
        name, width = GATED_PREFIX + _activation(sites), sites[0].width
        return [
            ConfigEntry(
                config=config, activations={}, options=None,
                fields={"feed_forward_proj": name, str(width_field(config)): width},
            )
            for config, _ in governed(model, sites)
        ]  # fmt: skip

    @torch.no_grad()
    def apply(self, work: Work, step: Step) -> Fit | None:
        _replace(work.model, step.site, _activation([step.site]))
        return None


def dense_t5_sites(model: nn.Module) -> list[Site]:
    """Return the FFNs of T5's first layout, converted or not; raise NoSiteError where there are none."""
    sites = [site for site in find_sites(model) if type(site.anchor).__name__.endswith(DENSE)]
    if not sites:
        raise NoSiteError(f"{type(model).__name__} has no FFN of T5's: the native layout is that of T5 v1.1")
    return sites


def _activation(sites: list[Site]) -> str:
    """Return what follows ``gated-`` in the config."""
    names = {site.activation for site in sites}
    if len(names) > 1 or len({site.width for site in sites}) > 1 or not all(site.widened for site in sites):
        raise ConversionError("T5 v1.1's layout has one gated activation and one width in all layers of both stacks")
    name = str(names.pop())
    gate = native_gate(name)
    native = NATIVE_NAMES.get(gate, gate)
    if native is None:
        raise ConversionError(f"stock T5 has no {name}: its gated-gelu is the tanh form, geglu_new")
    return native


def _check_bias(site: Site) -> None:
    bias = site.in_proj.bias
    if bias is not None and bias.any():
        raise ConversionError(
            f"{site.name} has a bias, for which T5 v1.1's layout has no place: convert with bias=False and calibration="
        )


def _replace(model: nn.Module, site: Site, name: str) -> None:
    dense, config = site.anchor, copy.copy(governing_configs(model, site)[0])
    config.feed_forward_proj = GATED_PREFIX + name
    setattr(config, str(width_field(config)), site.width)
    sync_derived(config, always=True)
    gated_class = getattr(sys.modules[type(dense).__module__], type(dense).__name__.replace(DENSE, GATED))
    gate, up = weight_rows(site.in_proj).chunk(2)
    with torch.device("meta"):
        gated = gated_class(config)
    act = getattr(site.act, "phi", None)
    for linear, rows in ((gated.wi_0, gate), (gated.wi_1, up)):
        set_rows(linear, rows.clone(), None)
        linear.weight.requires_grad_(site.in_proj.weight.requires_grad)
    gated.wo, gated.dropout = site.out_proj, dense.dropout
    if isinstance(act, nn.Module):
        gated.act = act
    owner, _, attribute = site.name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, gated.train(dense.training))
