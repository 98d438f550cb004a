"""Dictionaries in targets: ``moa_swiglu(silu,relu)`` is ``moa_swiglu`` with a mix of these functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import Any

from hf_glu.activation import registry
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.config.glu import check_by_layer, check_mix
from hf_glu.config.registry import LEARNABLE
from hf_glu.conversion.steps import Target
from hf_glu.errors import OptionError, refuse_unknown

_NAMED = re.compile(r"(?P<name>\w+)\s*\((?P<functions>[\w\s,]+)\)")


def check_section_names(given: Iterable[str], *functions: Callable[..., Any]) -> None:
    """Raise UnknownNameError for an option that neither the functions nor a wrapper has; the last one is named."""
    every = (known for function in functions for known in signature(function).parameters.values())
    own = [known.name for known in every if known.kind is known.KEYWORD_ONLY]
    refuse_unknown(given, (*own, *registry.sections), f"the options of {functions[-1].__name__}")


def read_dictionary(target: Target, mix: Mapping[str, Any] | None) -> tuple[Target, dict[str, Any] | None]:
    """Return the target's plain name (or names by layer), and the options of its mix.

    Args:
        target: a name, or names by layer, which may have functions in parentheses.
        mix: as ``config.hf_glu["mix"]``; of its functions those of the target are the continuation.

    Raises:
        OptionError: it can't be read, is for no mix, or differs among layers.
        UnknownNameError: an unknown function.
    """
    check_mix(mix)
    if not isinstance(target, str):
        check_by_layer(target)
    names = {"": target} if isinstance(target, str) else dict(target)
    read = {layers: _read(name) for layers, name in names.items() if isinstance(name, str)}
    given = {functions for _, functions in read.values() if functions}
    if len(given) > 1:
        raise OptionError(f"all layers share one dictionary, got {' and '.join(map(str, sorted(given)))}")
    options = dict(mix or {})
    if functions := [*options.get("functions", ()), *(given.pop() if given else ())]:
        options["functions"] = list(dict.fromkeys(functions))
        for function in options["functions"]:
            build_elementwise(function)
    if isinstance(target, str):
        return read[""][0], options or None
    return {layers: read[layers][0] if layers in read else name for layers, name in target.items()}, options or None


def _read(name: str) -> tuple[str, tuple[str, ...]]:
    """Return a name and its functions."""
    if "(" not in name and ")" not in name:
        return name, ()
    match = _NAMED.fullmatch(name.strip())
    functions = tuple(part.strip() for part in match["functions"].split(",")) if match else ()
    if match is None or not all(functions):
        raise OptionError(f"{name!r} can't be read: a dictionary is such as moa_swiglu(silu,relu,gelu)")
    if LEARNABLE not in registry[match["name"]].flags:
        known = ", ".join(family.affix for family in registry.families if family.place == "mix")
        raise OptionError(f"{match['name']} mixes nothing: a dictionary is for {known} names")
    return match["name"], functions
