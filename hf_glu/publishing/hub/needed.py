"""The code that a model needs of the package, by what it has: with `absent` in the place of what it goes without."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hf_glu.activation.context import Reader
from hf_glu.activation.kappa import Sharpness
from hf_glu.activation.kinds import FAMILIES
from hf_glu.config.glu import GluConfig
from hf_glu.config.kinds import allow, no_parts
from hf_glu.ffn.config_fields import configs_of
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.experts.copies import Copies
from hf_glu.ffn.experts.native import MixedBank
from hf_glu.ffn.families import DERIVED_FIELDS, SiteRow
from hf_glu.ffn.mixers import GatedMixer
from hf_glu.publishing.hub import absent
from hf_glu.publishing.hub.entries import Entries
from hf_glu.publishing.hub.program import Program
from hf_glu.publishing.hub.stock import Stock

ROOT = ("hf_glu.plugin.standalone", "GluModel")


def program_for(model: Any, stock: Stock) -> str:
    """Return what the code of a model, and of other stock classes for its config, needs of the package, as source."""
    layouts = stock.layouts
    parts = list(model.modules())
    every = {family.home for family in FAMILIES}
    configs = list(configs_of(model.config))
    options = [GluConfig.of(config) for config in configs]
    kinds = {base.__module__ for part in parts for base in type(part).__mro__} & every
    entries = Entries(model.config, options, readings=bool(kinds))
    sections = entries.sections.values()
    kinds |= {family.home for family in FAMILIES if family.kind in sections}
    experts, banks = bool(find_experts(model)), any(isinstance(part, MixedBank) for part in parts)
    mixers = any(isinstance(part, GatedMixer) for part in parts)
    hears = any(isinstance(part, Sharpness) for part in parts)
    there = (
        (experts, absent.WITHOUT_EXPERTS),
        (banks, absent.WITHOUT_BANKS),
        (any(isinstance(part, Copies) for part in parts), absent.WITHOUT_COPIES),
        (experts or banks, absent.WITHOUT_OPTIONS),
        (mixers, absent.WITHOUT_MIXERS),
        (any(isinstance(part, Reader) for part in parts), absent.WITHOUT_READERS),
        (bool(sections), absent.WITHOUT_SECTIONS),
        (any(kind.check is not allow for kind in sections), absent.WITHOUT_CHECKS),
        (any(kind.parts is not no_parts for kind in sections), absent.WITHOUT_PARTS),
        (any(field in vars(part) for part in configs for field in DERIVED_FIELDS), absent.WITHOUT_DERIVED),
        (any(entry.layers is not None or entry.by_layer for entry in options), absent.WITHOUT_LAYERS),
        (any(entry.width is not None for entry in options), absent.WITHOUT_WIDTH),
        (stock.names, absent.WITHOUT_NAMES),
        (hears, absent.WITHOUT_KAPPA),
        (bool(kinds), absent.WITHOUT_KINDS),
    )
    stubs = {**absent.ALWAYS, ("hf_glu.ffn.families", "SITE_TABLE"): _table(layouts)}
    for is_there, more in there:
        stubs |= {} if is_there else more
    layout_kinds = {row.kind for row in layouts} | ({"mixer"} if mixers else set()) | ({"experts"} if banks else set())
    off = absent.OFF | conditions_of(layouts, layout_kinds) | (frozenset() if hears else absent.UNHEARD)
    program = Program(stubs, off, every - kinds, {"hf_glu.errors"})
    program.need([ROOT, *entries.needed])
    source = program.write()
    return f"{source}\n{entries.source(program.names)}"


def conditions_of(layouts: tuple[SiteRow, ...], kinds: set[str]) -> set[str]:
    """Return the conditions that never hold of sites of these kinds."""
    found = {f"kind == {kind!r}" for kind in ("dense", "packed", "experts", "mixer") if kind not in kinds}
    if not kinds - {"dense"}:
        found |= {"native", "kind != 'dense'", "kind in ('gated', 'packed')"}
    if not any(row.gate for row in layouts):
        found |= {"row.gate is not None", "row.gate"}
    return found


def _table(layouts: tuple[SiteRow, ...]) -> str:
    """Return the source of the rows of the sites' table for some layouts."""
    rows = ("    SiteRow({}),".format(", ".join(f"{key}={value!r}" for key, value in _given(row))) for row in layouts)
    return "\n".join(["SITE_TABLE = (", *rows, ")"])


def _given(row: SiteRow) -> list[tuple[str, Any]]:
    """Return the values of a row that aren't the default; its families only where they count."""
    values = {one.name: getattr(row, one.name) for one in fields(row) if getattr(row, one.name) != one.default}
    return [(key, value) for key, value in values.items() if key != "families" or row.exclusive]
