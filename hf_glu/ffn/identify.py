"""Which activation a site has now, by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from hf_glu.activation import registry
from hf_glu.activation.elementwise import name_of
from hf_glu.activation.stock import elementwise_names
from hf_glu.config.glu import GluConfig
from hf_glu.errors import ConversionError
from hf_glu.ffn.config_fields import activation_field, activation_of
from hf_glu.ffn.mixers import gate_of
from hf_glu.ffn.sites import Site

# fields of configs that say how many experts a token uses
CHOSEN = (
    "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k",
)  # fmt: skip


def enclosing_configs(model: nn.Module, name: str) -> Iterator[Any]:
    """Yield the configs of the models around the module called ``name``, the innermost first."""
    parts = name.split(".") if name else []
    for end in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        if hasattr(config, "to_dict"):
            yield config


def top_k_of(model: nn.Module, name: str) -> int | None:
    """Return how many experts of the bank called ``name`` a token uses, None where no config says it."""
    for config in enclosing_configs(model, name):
        for field in CHOSEN:
            if type(value := getattr(config, field, None)) is int:
                return value
    return None


def governing_configs(model: nn.Module, site: Site) -> list[Any]:
    """Return the configs whose activation field governs a site; where none has one, those of its own family."""
    around = list(enclosing_configs(model, site.name))
    fielded = [config for config in around if activation_field(config, site.stack)]
    return fielded or [config for config in around if type(config) is type(around[0])]


def source_activation(model: nn.Module, site: Site) -> str:
    """Return the name of the activation that a site has now: the config's, where the module bears it out.

    Raises:
        ConversionError: Transformers has no name for it.
    """
    if site.activation:
        return site.activation
    if site.kind == "mixer" and (own := gate_of(site.anchor)):
        return own
    named: list[str] = []
    for config in enclosing_configs(model, site.name):
        named += [name for name in (activation_of(config, site.stack), GluConfig.of(config).dense_act) if name]
    gates = [found.gate for name in named if (found := registry.find(name)) and found.gate]
    name = name_of(site.act, (*named, *gates, *elementwise_names()))
    if name is None:
        raise ConversionError(f"{site.name}: Transformers has no name for its activation {type(site.act).__name__}")
    return name


def describe_site(model: nn.Module, site: Site) -> dict[str, Any]:
    """Return a site as plain data, its activation by name where it has one."""
    try:
        name = source_activation(model, site)
    except ConversionError:
        name = type(site.act).__name__
    return {**site.to_dict(), "activation": name}
