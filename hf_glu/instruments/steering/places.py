"""Where a model's gates are, by names that don't depend on its family, head or wrapper, and whose weights they have.

``layers.3``, ``encoder.layers.3``; ``layers.3.1`` is a second gate of that layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.config.glu import GluConfig
from hf_glu.config.layers import check_layers, selected
from hf_glu.errors import NoSiteError, OptionError
from hf_glu.ffn.build import check_selection
from hf_glu.ffn.linear import weight_rows
from hf_glu.ffn.sites import Site, need_model
from hf_glu.instruments.adapted import gate_sites
from hf_glu.instruments.pre_activations import gate_rows

EXPERTS = "experts"  # what families call modules of experts
SAMPLE = 16  # weights of a gate by which a model is known again
ROUNDING = 2**-7  # relative: bfloat16 and int8 keep a weight that well, another model's is another number


def named_sites(model: nn.Module) -> dict[str, Site]:
    """Return the gates of ``model`` by their names, without those of experts, which may be none."""
    need_model(model)
    found: dict[str, Site] = {}
    for site in gate_sites(model):
        if site.kind == EXPERTS or EXPERTS in site.path.split("."):
            continue  # which are given the tokens that a router sends there, in an order of its own
        name = layer = place_of(site)
        while name in found:
            name = f"{layer}.{int(name.removeprefix(layer).strip('.') or 0) + 1}"
        found[name] = site
    return found


def place_of(site: Site) -> str:
    """Return the name of a site's gate, where its layer has no other."""
    return f"{site.stack}.layers.{site.layer}" if site.stack else f"layers.{site.layer}"


def gate_places(model: nn.Module, layers: Any = None) -> dict[str, Site]:
    """Return the gates of ``model`` by their names, in the order of its modules; those of experts aren't among them.

    Args:
        model: the model.
        layers: which (see `hf_glu.config.layers`); None: all.

    Raises:
        NoSiteError: there is none.
        OptionError: a layer that the model doesn't have.
    """
    found = named_sites(model)
    if not found:
        raise NoSiteError(
            f"{type(model).__name__} has no gate that hf_glu knows (those of experts see other tokens each, and are "
            "steered by hand only: hf_glu.modulation)"
        )
    spec = check_layers(layers)
    check_selection(list(found.values()), GluConfig(layers=spec))
    chosen = {name: site for name, site in found.items() if selected(spec, site.layer, site.stack)}
    if not chosen:
        raise OptionError(f"layers={layers!r} selects none of {', '.join(found)}")
    return chosen


@torch.no_grad()
def sample(site: Site) -> Tensor:
    """Return weights of a site's gate, evenly spaced: ``[SAMPLE]``, float32. A converted model has the dense one's."""
    linear, begin = gate_rows(site)
    rows = weight_rows(linear)[begin : begin + site.width]
    at = torch.linspace(0, rows.numel() - 1, SAMPLE, dtype=torch.float64).long()
    found = rows[(at // rows.shape[1]).to(rows.device), (at % rows.shape[1]).to(rows.device)]
    return found.detach().float().cpu()


def check_model(model: nn.Module, widths: Mapping[str, int], samples: Mapping[str, Tensor], *, of: str) -> None:
    """Check that ``model`` is the one that a modulation was fitted on: its gates, their widths, their weights.

    Args:
        model: the model.
        widths, samples: of the gates of the one before, by their names.
        of: what that one was.

    Raises:
        OptionError: it is another model.
    """
    places, kind = gate_places(model), type(model).__name__
    told = f"the modulation is of another model, {of}"
    for name, width in widths.items():
        if name not in places:
            raise OptionError(f"{told}: {kind} has no gate {name}")
        if places[name].width != width:
            raise OptionError(f"{told}: the gate {name} of {kind} has {places[name].width} channels, not {width}")
    for name, known in samples.items():
        if not same_weights(sample(places[name]), known):
            raise OptionError(f"{told}: the gate {name} of {kind} has other weights (check=False steers it anyway)")


def same_weights(found: Tensor, known: Tensor) -> bool:
    """Return whether two samples are of the same weights, in whatever precision each was loaded."""
    scale = known.abs().mean().clamp_min(1e-12)
    return bool(((found - known).abs() <= ROUNDING * (known.abs() + scale)).all())
