"""What wrapped activations (states, context vectors) ask of the model around their sites."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hf_glu.activation import registry
from hf_glu.activation.modulated import ContextSource
from hf_glu.config.context import ContextOptions
from hf_glu.config.glu import GluConfig
from hf_glu.config.registry import ADAPTIVE, LEARNABLE, MODULATED, STATEFUL
from hf_glu.config.state import StateOptions
from hf_glu.conversion.forms import size
from hf_glu.errors import OptionError
from hf_glu.ffn.context_sites import check_directions, place_sources, source_places
from hf_glu.ffn.sites import Site

Flagged = Iterable[tuple[Site, frozenset[str]]]  # sites with the flags of the activations that they get
AWAKE_NOTE = "alpha and beta aren't 0: the state changes the function from the start"


def read_options(
    names: Iterable[str], mix: Mapping[str, Any] | None, state: Mapping[str, Any] | None,
    context: Mapping[str, Any] | None,
) -> GluConfig:  # fmt: skip
    """Return the options of the activations ``names``; raise OptionError for one that none of them is for."""
    names = list(names)
    flags = {flag for entry in map(registry.find, names) if entry for flag in entry.flags}
    for key, entry, flag in (("state", state, STATEFUL), ("context", context, MODULATED), ("mix", mix, LEARNABLE)):
        if entry is not None and flag not in flags:
            raise OptionError(f"{key} is for {flag}_swiglu and other {flag} names, not {', '.join(names)}")
    if ADAPTIVE not in flags and (useless := sorted({"gate", "rank"} & set(mix or {}))):
        raise OptionError(f"mix {useless[0]} is for moa_swiglu and other moa names, not {', '.join(names)}")
    states, contexts = StateOptions.from_dict(state).to_dict(), ContextOptions.from_dict(context).to_dict()
    return GluConfig(mix=None if mix is None else dict(mix), state=states or None, context=contexts or None)


def is_awake(flags: frozenset[str], acts: GluConfig) -> bool:
    """Tell whether an activation's state has an effect from the start."""
    return STATEFUL in flags and not StateOptions.from_dict(acts.state).neutral


def check_wrappers(model: nn.Module, sites: Flagged, acts: GluConfig) -> None:
    """Raise OptionError where a state would look ahead in a stack that must not see later tokens."""
    check_directions(model, _with(STATEFUL, sites), StateOptions.from_dict(acts.state))


def wrapper_parameters(model: nn.Module, sites: Flagged, acts: GluConfig) -> int:
    """Return how many parameters the sources of context vectors add."""
    options = ContextOptions.from_dict(acts.context)
    return sum(place.parameters(options) for place in source_places(model, _with(MODULATED, sites), options))


def placed_parameters(model: nn.Module) -> int:
    """Return how many parameters the sources have that are there now."""
    return sum(size(module) for module in model.modules() if isinstance(module, ContextSource))


def place_wrappers(model: nn.Module, sites: Flagged, acts: GluConfig) -> None:
    """Put the sources of context vectors in their places."""
    place_sources(model, _with(MODULATED, sites), ContextOptions.from_dict(acts.context))


def _with(flag: str, sites: Flagged) -> list[Site]:
    return [site for site, flags in sites if flag in flags]
