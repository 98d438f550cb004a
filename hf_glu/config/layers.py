"""Which layers: ``None`` (all), ``[0, 2]``, ``"0-5,8"``, ``"every 2"`` (0, 2, ...), ``"encoder"``, or a mapping.

A mapping gives each stack of an encoder-decoder its own selection, ``{"encoder": "0-3"}``; a stack that it does not
name has none. ``"encoder 0-3"`` says the same. Layers are counted from 0 in each stack.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hf_glu.config.section import MAX_LAYERS, is_count
from hf_glu.errors import OptionError, shown

STACKS = ("encoder", "decoder")
LayerSpec = None | str | list[int] | dict[str, Any]

LONGEST = 10_000  # letters of a selection
_EVERY = re.compile(r"every\s+(\d{1,9})")
_IN_STACK = re.compile(rf"({'|'.join(STACKS)})\s+(.+)")
_RANGE = re.compile(r"(\d{1,9})(?:\s*-\s*(\d{1,9}))?")


def check_layers(spec: Any) -> LayerSpec:
    """Return ``spec`` in the form that JSON keeps, or raise OptionError where it can't be read."""
    if spec is None or spec == "all":
        return None
    if isinstance(spec, Mapping):
        for stack in spec:
            if stack not in STACKS:
                raise OptionError(f"layers names the stack {shown(stack)}; valid: encoder, decoder")
            if isinstance(spec[stack], Mapping) or spec[stack] in STACKS:
                raise OptionError(f"layers[{stack!r}] must select layers by number, got {shown(spec[stack])}")
        parts = {stack: check_layers(value) for stack, value in spec.items()}
        for stack, part in parts.items():
            if isinstance(part, dict):
                raise OptionError(f"layers[{stack!r}] must select layers by number, got {shown(spec[stack])}")
        return {stack: "all" if part is None else part for stack, part in parts.items()}
    if isinstance(spec, str):
        if spec in STACKS:
            return {spec: "all"}
        if len(spec) <= LONGEST and (match := _IN_STACK.fullmatch(spec.strip())):
            return check_layers({match[1]: match[2]})
        _parse(spec)
        return spec
    if isinstance(spec, (list, tuple, set, frozenset, range)):
        if len(spec) <= MAX_LAYERS and all(is_count(layer, MAX_LAYERS, 0) for layer in spec):
            return sorted(spec)
    raise OptionError(f"layers must be such as [0, 2], '0-5,8', 'every 2', 'encoder' or a mapping, got {shown(spec)}")


def read_exclude(pattern: str | None) -> re.Pattern[str] | None:
    """Return the pattern of sites' names that are left alone, None where there is none.

    Raises:
        OptionError: it is no regular expression.
    """
    try:
        return re.compile(pattern) if pattern else None
    except re.error as error:
        raise OptionError(f"exclude={pattern!r} is no regular expression: {error}") from None


def selected(spec: LayerSpec, layer: int, stack: str | None = None) -> bool:
    """Return whether ``spec`` (as `check_layers` returns it) selects ``layer`` of ``stack``."""
    if isinstance(spec, dict):
        if stack not in spec:
            return False
        spec = check_layers(spec[stack])
    if spec is None:
        return True
    if isinstance(spec, list):
        return layer in spec
    assert isinstance(spec, str)
    step, ranges = _parse(spec)
    return layer % step == 0 if step else any(low <= layer <= high for low, high in ranges)


def highest(spec: LayerSpec) -> int:
    """Return the highest layer that ``spec`` names, -1 where it names none by number."""
    if isinstance(spec, dict):
        return max((highest(check_layers(part)) for part in spec.values()), default=-1)
    if isinstance(spec, list):
        return max(spec, default=-1)
    if isinstance(spec, str):
        return max((high for _, high in _parse(spec)[1]), default=-1)
    return -1


def _parse(spec: str) -> tuple[int, list[tuple[int, int]]]:
    """Return (step, []) for ``every N`` and (0, ranges) for ``0-5,8``."""
    if len(spec) > LONGEST:
        raise OptionError(f"layers={shown(spec)} is longer than any selection of layers")
    if match := _EVERY.fullmatch(spec.strip()):
        if (step := int(match[1])) < 1:
            raise OptionError(f"layers={shown(spec)}: the step must be at least 1")
        return step, []
    ranges = []
    for part in spec.split(","):
        match = _RANGE.fullmatch(part.strip())
        if not match or (match[2] and int(match[2]) < int(match[1])):
            wanted = "'0-5,8', 'every 2', 'encoder' or 'all'"
            raise OptionError(f"layers={shown(spec)} can't be read; write such as {wanted}")
        ranges.append((int(match[1]), int(match[2] or match[1])))
    return 0, ranges
