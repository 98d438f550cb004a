"""Rules that a Transformers class has for parameters and modules by name, where ours have other names.

A widened in-projection keeps its name. Experts don't: what was said of a projection by name is said of theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hf_glu.compat.of_models import IGNORE_MISSING, IGNORE_UNEXPECTED, KEEP_FP32, KEEP_FP32_STRICT, NO_SPLIT, TIED_KEYS
from hf_glu.errors import ConversionError

# lists of patterns that are looked for in a parameter's name
PATTERNS = (KEEP_FP32.name, KEEP_FP32_STRICT.name, IGNORE_MISSING.name, IGNORE_UNEXPECTED.name)
# those of parameters that are one: a mapping of names once a model is built, of what names begin with before
TIES = ("all_tied_weights_keys", TIED_KEYS.name)


def carry_rules(model: Any, old: Iterable[str], place: str, kind: str) -> None:
    """Let the rules of ``model`` that hold for the parameters ``old`` hold for those that take their place.

    Args:
        model: whose class has the rules.
        old: names.
        place: of the module that they are in now.
        kind: what their names in it look like.

    Raises:
        ConversionError: a parameter of ``old`` is tied to another.
    """
    old = list(old)
    ties: dict[str, str] = next((pairs for name in TIES if (pairs := getattr(model, name, None)) is not None), {})
    tied = [name for name in old if any(re.match(each, name) for pair in ties.items() for each in pair)]
    if tied:
        raise ConversionError(f"{type(model).__name__} ties {tied[0]} to another parameter: experts would part them")
    ours = re.sub(r"\d+", r"\\d+", re.escape(place)) + r"\." + kind
    for attribute in PATTERNS:
        patterns = getattr(model, attribute, None) or ()
        if any(re.search(pattern, name) for pattern in patterns for name in old):
            setattr(model, attribute, {*patterns, ours})
    if unsplit := NO_SPLIT.of(model, None):
        NO_SPLIT.put(model, {*unsplit, "ExpertFFN"})
