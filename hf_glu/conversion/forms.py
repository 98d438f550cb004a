"""What an FFN is, as far as a config and a plan speak of it; and what a config is to say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn

from hf_glu.activation.stock import is_elementwise, same_function
from hf_glu.config.layers import LayerSpec, selected
from hf_glu.config.router_fields import remove_router_fields
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.config_fields import sync_derived, write_activation
from hf_glu.ffn.identify import governing_configs, source_activation
from hf_glu.ffn.sites import Site


@dataclass(frozen=True, kw_only=True)
class Form:
    """What an FFN is: its activation, hidden units, whether it is ``[gate | up]``, and whether that has a bias."""

    activation: str
    width: int
    widened: bool
    bias: bool

    def same(self, other: Form) -> bool:
        """Return whether the two are the same FFN, by whatever name of its function."""
        both = is_elementwise(self.activation) and is_elementwise(other.activation)
        if not (self.activation == other.activation or (both and same_function(self.activation, other.activation))):
            return False
        return (self.width, self.widened, self.bias) == (other.width, other.widened, other.bias)

    def __str__(self) -> str:
        gated = "[gate | up], " if self.widened else ""
        return f"{self.activation}, {gated}{self.width} units, {'a' if self.bias else 'no'} bias"


def form_of(model: nn.Module, site: Site) -> Form:
    """Return what an FFN is now."""
    try:
        name = source_activation(model, site)
    except ConversionError:
        name = type(site.act).__name__
    return Form(activation=name, width=site.width, widened=site.widened, bias=has_bias(site))


def has_bias(site: Site) -> bool:
    """Return whether a site's in-projection has a bias."""
    return site.kind != "experts" and site.in_proj.bias is not None


def size(module: nn.Module) -> int:
    """Return how many parameters a module has, once each."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True, kw_only=True)
class ConfigEntry:
    """What one config is to say.

    Attributes:
        config: the config.
        activations: for the activation fields of its stacks (None: the one for all).
        options: for ``config.hf_glu``; None where the stock family has all of it itself.
        fields: for further fields of the family's own, such as its width.
    """

    config: Any
    activations: Mapping[str | None, str]
    options: dict[str, Any] | None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def write(self, config: Any = None) -> None:
        """Write it, or write it into a copy; an activation for which the family has no field goes into the options.

        Raises:
            ConversionError: the family's config class takes some values only, and these aren't among them.
        """
        config = self.config if config is None else config
        try:
            self._write(config)
        except StrictDataclassError as error:
            reason = " ".join(str(error).split())
            raise ConversionError(f"{type(config).__name__} can't say what is asked for: {reason}") from error

    def _write(self, config: Any) -> None:
        for stack, name in self.activations.items():
            write_activation(config, name, stack)
        if "experts" not in (self.options or {}):
            remove_router_fields(config)
        if self.options is None:
            vars(config).pop("hf_glu", None)
        else:
            config.hf_glu = self.options
        for key, value in self.fields.items():
            setattr(config, key, value)
        if self.fields:
            sync_derived(config, always=True)


def governed(model: nn.Module, sites: Iterable[Site]) -> list[tuple[Any, list[Site]]]:
    """Return the configs that govern ``sites``, each with those that it governs."""
    found: dict[int, tuple[Any, list[Site]]] = {}
    for site in sites:
        for config in governing_configs(model, site):
            found.setdefault(id(config), (config, []))[1].append(site)
    return list(found.values())


def selection_of(gated: list[Site], sites: list[Site]) -> LayerSpec:
    """Return the selection that gives ``gated`` among ``sites``."""
    if len(gated) == len(sites):
        return None
    stacks = {site.stack for site in sites}
    spec: LayerSpec
    if stacks <= {None} or len(stacks) == 1:
        spec = sorted({site.layer for site in gated})
    else:
        spec = {
            str(stack): sorted({site.layer for site in gated if site.stack == stack})
            for stack in sorted({str(site.stack) for site in gated})
        }
    wanted = {site.name for site in gated}
    if wanted != {site.name for site in sites if selected(spec, site.layer, site.stack)}:
        raise OptionError("the chosen sites are not whole layers, which is what a config can say: widen the choice")
    return spec
