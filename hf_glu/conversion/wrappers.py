"""What wrapped activations ask of the model around their sites, by what their kinds say of themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from hf_glu.activation import registry
from hf_glu.activation.modulated import ContextSource
from hf_glu.config.glu import GluConfig
from hf_glu.config.registry import ADAPTIVE, LEARNABLE
from hf_glu.conversion.forms import size
from hf_glu.errors import OptionError
from hf_glu.ffn.context_sites import Flagged, needed_parts

Sections = Mapping[str, Mapping[str, Any] | None]  # of ``config.hf_glu``, by their keys


def read_options(names: Iterable[str], mix: Mapping[str, Any] | None, sections: Sections) -> GluConfig:
    """Return the options of the activations ``names``; raise OptionError for one that none of them is for."""
    names = list(names)
    flags = {flag for entry in map(registry.find, names) if entry for flag in entry.flags}
    given = [(key, sections.get(key), kind.flag) for key, kind in registry.sections.items()]
    for key, entry, flag in (*given, ("mix", mix, LEARNABLE)):
        if entry is not None and flag not in flags:
            raise OptionError(f"{key} is for {flag}_swiglu and other {flag} names, not {', '.join(names)}")
    if ADAPTIVE not in flags and (useless := sorted({"gate", "rank"} & set(mix or {}))):
        raise OptionError(f"mix {useless[0]} is for moa_swiglu and other moa names, not {', '.join(names)}")
    kinds = registry.sections.items()
    changed = {key: kind.section.from_dict(sections.get(key)).to_dict() or None for key, kind in kinds if kind.section}
    return GluConfig(mix=None if mix is None else dict(mix), sections=changed)


def awake_notes(flags: Collection[str], acts: GluConfig) -> list[str]:
    """Return why activations with these flags have an effect from the start; nothing: they have none."""
    sections = [acts.read(kind.section) for kind in registry.sections.values() if kind.flag in flags and kind.section]
    return [section.awake for section in sections if not section.neutral]


def wrapper_parameters(model: nn.Module, sites: Flagged, acts: GluConfig) -> int:
    """Return how many parameters the model gets beside the activations at ``sites``, such as context sources."""
    return sum(part.parameters for part in needed_parts(model, sites, acts) if not part.taken)


def placed_parameters(model: nn.Module) -> int:
    """Return how many parameters the sources of context vectors have that are there now."""
    return sum(size(module) for module in model.modules() if isinstance(module, ContextSource))
