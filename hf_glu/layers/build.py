"""Turning a freshly built stock model, whose config names a gated activation, into one with gated FFNs.

The stock constructor has put a `GatedActivation` wherever it reads that config field. At each FFN site the
in-projection is widened to ``[gate | up]``; a natively gated site gets the gate's elementwise part; everything else (an
LM head's transform, layers that were not chosen) gets the dense activation.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_glu.activation import GatedActivation, build_elementwise, registry
from hf_glu.config import GluConfig, iso_width
from hf_glu.errors import ConversionError, NoSiteError, OptionError
from hf_glu.layers.fields import default_activation
from hf_glu.layers.linear import out_features, resize
from hf_glu.layers.sites import Site, find_sites
from hf_glu.selection import highest, selected


def gated_modules(model: nn.Module) -> list[tuple[str, GatedActivation]]:
    """Return the gated activations in ``model`` with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, GatedActivation)]


def build_gated(model: nn.Module, config: Any) -> list[Site]:
    """Gate the FFN sites of ``model`` in place, before its weights are initialised; return the gated sites.

    Does nothing where there is no gated activation, and nothing to sites that are widened already.

    Raises:
        NoSiteError: the model uses a gated activation but has no FFN site that the table knows.
        OptionError: the options select layers that the model doesn't have.
        ConversionError: the activation can't be the gate of a natively gated family.
    """
    if not gated_modules(model):
        return []
    options = GluConfig.of(config)
    sites = find_sites(model)
    if not sites:
        raise NoSiteError(
            f"{type(model).__name__} has no feed-forward network that hf_glu knows how to gate; "
            "`hf-glu sites MODEL` lists what it finds, the dense activations are Transformers' own"
        )
    check_selection(sites, options)
    dense = options.dense_act or default_activation(config)
    gated = [site for site in sites if site.activation and _build_site(site, options, dense)]
    placed = {id(site.act) for site in gated}
    for name, module in gated_modules(model):
        if id(module) not in placed:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, build_elementwise(dense))
    return gated


def check_selection(sites: list[Site], options: GluConfig) -> None:
    """Raise OptionError where ``options.layers`` names a layer that none of ``sites`` has."""
    layers = max(site.layer for site in sites) + 1
    if highest(options.layers) >= layers:
        raise OptionError(f"layers={options.layers!r} is out of range: the model has layers 0 to {layers - 1}")


def _build_site(site: Site, options: GluConfig, dense: str) -> bool:
    """Gate one site; return whether it holds a gated activation afterwards."""
    name = site.activation
    assert name is not None
    chosen = selected(options.layers, site.layer, site.stack)
    if site.native or not chosen:
        site.set_act(build_elementwise(native_gate(name) if chosen else dense))
        return False
    if not site.widened:
        bias = site.in_proj.bias is not None if options.bias is None else options.bias
        width = gated_width(options.width, site.width)
        resize(site.in_proj, 2 * width, site.hidden, bias=bias)
        if width != site.width:
            resize(site.out_proj, out_features(site.out_proj), width, bias=site.out_proj.bias is not None)
    return True


def gated_width(width: int | str | None, dense: int) -> int:
    """Return the number of units of a gated FFN that takes the place of one with ``dense`` units."""
    if isinstance(width, int):
        return width
    return iso_width(dense) if width == "iso" else dense


def native_gate(name: str) -> str:
    """Return the elementwise activation that ``name`` means for a family that multiplies by the up half itself."""
    gate = registry[name].gate
    if gate is None:
        raise ConversionError(
            f"{name} ({registry[name].equation}) is no N(g) * u, which is all that a natively gated family can compute"
        )
    return gate
