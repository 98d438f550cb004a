"""Giving converted T5 models the layout of T5 v1.1, which stock Transformers has itself."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from hf_glu.conversion.checks import check_convertible, check_values
from hf_glu.conversion.transaction import whole
from hf_glu.errors import ConversionError, NoSiteError
from hf_glu.ffn.build import native_gate
from hf_glu.ffn.config_fields import GATED_PREFIX, sync_derived, width_field
from hf_glu.ffn.identify import governing_configs
from hf_glu.ffn.linear import set_rows, weight_rows
from hf_glu.ffn.sites import Site, find_sites

DENSE, GATED = "DenseActDense", "DenseGatedActDense"
# stock's "gated-gelu" is the tanh form, and nothing there means the other one
NATIVE_NAMES = {"gelu_new": "gelu", "gelu": None}


@whole
@torch.no_grad()
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
    check_convertible(model)
    check_values(model)
    wanted = dense_t5_sites(model)
    name = _activation(wanted)
    for site in wanted:
        _check_bias(site)
    configs = {id(config): config for site in wanted for config in governing_configs(model, site)}
    for config in configs.values():
        config.hf_glu = None
        config.feed_forward_proj = GATED_PREFIX + name
        setattr(config, str(width_field(config)), wanted[0].width)
        sync_derived(config, always=True)
    for site in wanted:
        _replace(model, site)
    return len(wanted)


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


def _replace(model: nn.Module, site: Site) -> None:
    dense = site.anchor
    gated_class = getattr(sys.modules[type(dense).__module__], type(dense).__name__.replace(DENSE, GATED))
    gate, up = weight_rows(site.in_proj).chunk(2)
    with torch.device("meta"):
        gated = gated_class(governing_configs(model, site)[0])
    act = getattr(site.act, "phi", None)
    for linear, rows in ((gated.wi_0, gate), (gated.wi_1, up)):
        set_rows(linear, rows.clone(), None)
        linear.weight.requires_grad_(site.in_proj.weight.requires_grad)
    gated.wo, gated.dropout = site.out_proj, dense.dropout
    if isinstance(act, nn.Module):
        gated.act = act
    owner, _, attribute = site.name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, gated.train(dense.training))
