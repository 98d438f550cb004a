"""Modulations that an operator has named, ``hf-glu run --modulation glad=FOLDER``, and what a request asks of them.

A request says names and strengths, never a path, in the entry `ENTRY` of a ``GenerationConfig``:
``{"glad": 1.5, "formal": {"strength": -0.5, "tokens": "generated"}}``.

Who loads a modulation stands above this room, so that it is a name here, looked up when one is loaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Any

from torch import nn

from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.writing import user_path
from hf_glu.errors import OptionError, UnknownNameError, refuse_unknown, shown
from hf_glu.instruments.steering.modulating import GateSteering
from hf_glu.instruments.steering.scope import Scope
from hf_glu.plugin import ENTRY, MODULATIONS

STRENGTH, TOKENS = "strength", "tokens"
LOADER, ONE_FILE = ("hf_glu.publishing.modulations", "GateModulation"), ".safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_EXAMPLE = "{'glad': 1.5} or {'glad': {'strength': 1.5, 'tokens': 'generated'}}"


@dataclass(frozen=True)
class Wanted:
    """One modulation that a request asks for: its name, how strongly, at which tokens."""

    name: str
    strength: float
    tokens: str = "all"


def named_folders(given: Sequence[str]) -> dict[str, str]:
    """Return where each modulation of ``NAME=FOLDER`` is, after loading it; one of the Hub is downloaded.

    Raises:
        OptionError: no such form, a name that can't be, or one that is given twice.
        CheckpointError: there is no modulation.
    """
    found: dict[str, str] = {}
    for each in given:
        name, _, source = each.partition("=")
        if not source or not _NAME.fullmatch(name):
            raise OptionError(
                f"--modulation is NAME=FOLDER, such as glad=modulations/glad or glad=user/glad, its name of letters, "
                f"digits, '-', '_' and '.'; got {shown(each)}"
            )
        if name in found:
            raise OptionError(f"two modulations are called {name}: give one of them another name")
        path = user_path(source) if source.endswith(ONE_FILE) else resolve(source)
        _load(str(path))
        found[name] = os.path.abspath(path)
    return found


def named() -> dict[str, str]:
    """Return where each modulation is that the operator of this process has named."""
    found: dict[str, str] = json.loads(os.environ.get(MODULATIONS, "{}"))
    return found


@cache
def _load(path: str) -> GateSteering:
    module, name = LOADER
    found: GateSteering = getattr(import_module(module), name).load(path)
    return found


def wanted_of(model: Any, config: Any) -> tuple[Wanted, ...]:
    """Return what a generation config asks for, or, where it says nothing, that of ``model``.

    Raises:
        OptionError, UnknownNameError: a name that the operator hasn't given, or what is no strength.
    """
    for each in (config, getattr(model, "generation_config", None)):
        for name in getattr(each, "__dict__", ()):
            if name != ENTRY and get_close_matches(name.casefold(), [ENTRY], cutoff=0.85):
                raise UnknownNameError(f"unknown entry {name!r} of a generation config; did you mean {ENTRY!r}?")
        if (value := getattr(each, ENTRY, None)) is not None:
            return read_wanted(value)
    return ()


def read_wanted(value: Any) -> tuple[Wanted, ...]:
    """Return what a request says, without what is at strength 0.

    Raises:
        OptionError, UnknownNameError: see `wanted_of`.
    """
    if not isinstance(value, Mapping):
        raise OptionError(f"{ENTRY} is names and strengths, such as {_EXAMPLE}, got {shown(value)}")
    known = named()
    for name in value:
        if name not in known:
            raise UnknownNameError(f"unknown {ENTRY} {shown(name)}; known: {', '.join(sorted(known))}")
    return tuple(each for name in value if (each := _read_one(name, value[name])).strength)


def _read_one(name: str, value: Any) -> Wanted:
    told = value if isinstance(value, Mapping) else {STRENGTH: value}
    refuse_unknown(told, (STRENGTH, TOKENS), f"{ENTRY} {name!r}")
    strength, tokens = told.get(STRENGTH), told.get(TOKENS, "all")
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not isinstance(tokens, str):
        raise OptionError(f"{ENTRY} {name!r} has one number as its strength, as in {_EXAMPLE}, got {shown(value)}")
    try:
        scope = Scope.read(float(strength), tokens)
    except OverflowError:
        raise OptionError(f"{ENTRY} {name!r}: strengths are finite numbers, got {shown(strength)}") from None
    return Wanted(name, float(strength), str(scope.tokens))


def check_wanted(model: nn.Module, wanted: Sequence[Wanted]) -> None:
    """Check that each modulation is of ``model``.

    Raises:
        OptionError, NoSiteError: it isn't.
    """
    for each in wanted:
        try:
            _load(named()[each.name]).check(model)
        except OptionError as error:
            raise OptionError(f"{ENTRY} {each.name!r}: {error}") from error


@contextmanager
def steering(model: nn.Module, wanted: Sequence[Wanted]) -> Iterator[None]:
    """Steer ``model`` as a request asks, in this thread; what goes to the same tokens is added up before."""
    check_wanted(model, wanted)
    sums: dict[str, GateSteering] = {}
    for each in wanted:
        part = each.strength * _load(named()[each.name])
        sums[each.tokens] = sums[each.tokens] + part if each.tokens in sums else part
    with ExitStack() as stack:
        for tokens in sorted(sums):
            stack.enter_context(sums[tokens].on(model, tokens=tokens, check=False))
        yield
