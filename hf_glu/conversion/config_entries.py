"""What the configs say after a conversion: the activation in the family's own field, and ``config.hf_glu``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_glu.activation import registry
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.config.glu import GluConfig, name_at
from hf_glu.config.registry import LEARNABLE
from hf_glu.conversion.foresight import foresee, forms_after
from hf_glu.conversion.forms import ConfigEntry, governed, selection_of
from hf_glu.conversion.steps import Rows, Step
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.build import native_gate
from hf_glu.ffn.config_fields import activation_field, activation_of, width_field
from hf_glu.ffn.sites import Site, convertible_sites


def config_entries(model: nn.Module, planned: Rows, acts: GluConfig) -> list[ConfigEntry]:
    """Return what each config around a converted site is to say after the conversion.

    What the family can say itself goes before what only hf_glu reads.

    Raises:
        OptionError, ConversionError: the configs can't say it, so that the model wouldn't load as it was converted.
    """
    changed = {step.site.name: step for step in planned.steps if step.changes}
    owned = governed(model, convertible_sites(model))
    owned = [each for each in owned if any(site.name in changed for site in each[1])]
    expected = forms_after(model, planned)
    wrong: str | None = None
    for stock in (True, False):
        entries = [_entry(config, sites, changed, acts, stock) for config, sites in owned]
        if not entries or (wrong := foresee(model, expected, partial(_write_copies, entries))) is None:
            return entries
    raise ConversionError(
        f"{type(model).__name__} would not load as it is converted: {wrong}. Its config class can't say it"
    )


def _write_copies(entries: list[ConfigEntry], copies: Mapping[int, Any]) -> None:
    for entry in entries:
        if (config := copies.get(id(entry.config))) is not None:
            entry.write(config)


def _entry(config: Any, sites: list[Site], changed: dict[str, Step], acts: GluConfig, stock: bool) -> ConfigEntry:
    """Return what ``config`` is to say; ``stock``: without options of ours, where the stock family has all of it."""
    steps = [changed[site.name] for site in sites if site.name in changed]
    old = GluConfig.of(config)
    names = {site.name: name for site in sites if (name := _name_after(config, site, changed))}
    gated = [site for site in sites if site.name in names]
    targets = list(dict.fromkeys(names.values()))
    layers = selection_of(gated, sites)
    optioned = any(acts.sections.values()) or any(LEARNABLE in registry[target].flags for target in targets)
    # a mixer's field is its convolution's, too
    native = layers is None and len(targets) == 1 and all(site.native and site.kind != "mixer" for site in sites)
    native = native and not _of_own_dtype(native_gate(targets[0]))
    width = _native_width(config, steps) if native and not optioned else None
    if stock and native and not optioned and old.width is None and (width or not _narrows(steps)):
        fields = {str(width_field(config)): width} if width else {}
        names_of = dict.fromkeys((site.stack for site in sites), native_gate(targets[0]))
        return ConfigEntry(config=config, activations=names_of, options=None, fields=fields)
    added = any(step.adds_bias for step in steps)
    options = GluConfig(
        activation=None if activation_field(config, gated[0].stack) else targets[0],
        dense_act=old.dense_act or _dense(config, steps[0]),
        bias=True if added else old.bias,
        layers=layers,
        by_layer=_by_layer(gated, names, sites) if len(targets) > 1 else None,
        mix=_mix(acts, old),
        width=_width(gated, changed, old),
        sections={key: _same(acts.sections.get(key), old.sections.get(key), key) for key in registry.sections},
    )
    first = {site.stack: names[site.name] for site in reversed(gated)}
    return ConfigEntry(config=config, activations=first, options=options.to_dict())


def _of_own_dtype(name: str) -> bool:
    """Return whether stock classes build an activation in another dtype than the model's: xIELU in bfloat16."""
    return any(part.dtype != torch.get_default_dtype() for part in build_elementwise(name).parameters())


def _dense(config: Any, step: Step) -> str:
    """Return the activation of what reads the config's field and isn't converted: around a mixer, its convolution."""
    named = activation_of(config) if step.site.kind == "mixer" else None
    return named or step.source


def _name_after(config: Any, site: Site, changed: dict[str, Step]) -> str | None:
    """Return the activation of ours that a site has after the conversion: a new one, or what its config says now."""
    if site.name in changed:
        return changed[site.name].target
    options = GluConfig.of(config)
    name = options.activation or activation_of(config, site.stack)
    return options.name_at(name, site.layer, site.stack) if registry.find(name) else None


def _by_layer(gated: list[Site], names: dict[str, str], sites: list[Site]) -> dict[str, str]:
    """Return the mapping from selections of layers to activations that gives ``names``."""
    several = len({site.stack for site in sites}) > 1
    layers: dict[tuple[str, str], set[int]] = {}
    for site in gated:
        layers.setdefault((f"{site.stack} " if several else "", names[site.name]), set()).add(site.layer)
    by_layer = {stack + ",".join(map(str, sorted(chosen))): name for (stack, name), chosen in layers.items()}
    if any(name_at(by_layer, site.layer, site.stack) != names[site.name] for site in gated):
        raise OptionError("the FFNs of one layer would differ, which a config can't say: widen the choice")
    return by_layer


def _mix(acts: GluConfig, old: GluConfig) -> dict[str, Any] | None:
    if old.mix and old.mix != acts.mix:
        raise ConversionError("other layers have a mix of other functions: convert all of them at once")
    return acts.mix


def _same(new: dict[str, Any] | None, old: dict[str, Any] | None, what: str) -> dict[str, Any] | None:
    if old and old != new:
        raise ConversionError(f"other layers have a {what} with other options: convert all of them at once")
    return new


def _narrows(steps: list[Step]) -> bool:
    return any(step.narrows for step in steps)


def _native_width(config: Any, steps: list[Step]) -> int | None:
    """Return the width that a natively gated family's own field is to say, None where it stays or can't say it."""
    widths = {(step.width_before, step.width) for step in steps}
    field = width_field(config)
    if not _narrows(steps) or len(widths) > 1 or field is None:
        return None
    before, after = widths.pop()
    return after if getattr(config, field) == before else None


def _width(gated: list[Site], changed: dict[str, Step], old: GluConfig) -> int | str | None:
    """Return what ``config.hf_glu`` is to say of the gated sites' width."""
    if not any(step.narrows for step in changed.values()):
        if old.width is not None and any(site.name in changed for site in gated):
            raise OptionError(f"other layers were converted with width={old.width!r}: give the same width")
        return old.width
    widths = {changed[site.name].width if site.name in changed else site.width for site in gated}
    if len(widths) > 1:
        if all(step.iso for step in changed.values()):
            return "iso"
        raise OptionError(f"the gated layers would have different widths, {sorted(widths)}, which a config can't say")
    return widths.pop()
