"""Carrying a plan out, in place, and measuring what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation import GatedActivation, build_elementwise, registry
from hf_glu.config import GluConfig
from hf_glu.conversion.guard import check_values
from hf_glu.conversion.measure import SiteProbe
from hf_glu.conversion.planning import Plan, Step, plan
from hf_glu.conversion.report import Report, SiteReport
from hf_glu.errors import OptionError
from hf_glu.layers.build import native_gate
from hf_glu.layers.fields import activation_field, write_activation
from hf_glu.layers.linear import set_rows, weight_rows
from hf_glu.layers.sites import Site, find_sites
from hf_glu.layers.source import enclosing_configs
from hf_glu.probe import max_abs_difference, probe_inputs, run
from hf_glu.selection import LayerSpec, selected


def convert(
    model: Any,
    target: str,
    *,
    layers: Any = None,
    exclude: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    check: bool = True,
) -> Report:
    """Convert ``model``'s feed-forward networks to the gated activation ``target``, in place.

    The in-projection becomes ``[gate | up]`` (twice as many rows), the activation ``target``, and the config says so;
    the out-projection stays. What the routes promise is measured on ``inputs`` and reported. Converting again to the
    same target changes nothing. Make the optimizer after the conversion: the in-projections' parameters are new ones.

    Args:
        model: a Transformers model of any head.
        target: a gated name, see `hf_glu.activations`.
        layers: which layers (see `hf_glu.selection`); None: all.
        exclude: regular expression; sites whose name it finds are left alone.
        inputs: keyword arguments of the model's forward to compare it on; None: random token ids.
        check: whether to run the model before and after.

    Raises:
        UnknownNameError, NoSiteError, ConversionError, OptionError: see `hf_glu.plan`; nothing is changed then.
    """
    planned = plan(model, target, layers=layers, exclude=exclude)
    check_values(model)
    entries = _config_entries(model, planned)
    before: dict[str, Tensor] = {}
    probe = SiteProbe([step.site for step in planned.steps])
    if check:
        inputs = dict(probe_inputs(model) if inputs is None else inputs)
        with probe.recording():
            before = run(model, inputs)
        probe.reference()
    for step in planned.steps:
        if step.changes:
            _apply(step, target)
    for config, name, entry in entries:
        write_activation(config, name)
        config.hf_glu = entry
    differences = max_abs_difference(before, run(model, inputs or {})) if check else None
    errors = probe.errors() if check else {}
    sites = tuple(
        SiteReport(step=step, relative_error=errors.get(step.site.name)) for step in planned.steps
    )  # fmt: skip
    return Report(plan=planned, sites=sites, differences=differences)


@torch.no_grad()
def _apply(step: Step, target: str) -> None:
    """Convert one site."""
    site = step.site
    if site.native:
        site.set_act(build_elementwise(native_gate(target)))
        return
    in_proj = site.in_proj
    rows, bias = weight_rows(in_proj), in_proj.bias
    s, t, c = step.route.constants(rows.dtype)
    new_rows = torch.cat([rows * s if s != 1 else rows, rows * t if t else torch.zeros_like(rows)])
    new_bias = None
    if bias is not None or c:
        old = torch.zeros_like(rows[:, 0]) if bias is None else bias
        new_bias = torch.cat([old * s if s != 1 else old, old * t + c])
    set_rows(in_proj, new_rows, new_bias)
    keep = step.source == registry[target].gate
    act = GatedActivation(target, phi=site.act if keep else None)
    site.set_act(act.to(rows.device).train(site.act.training))


def _config_entries(model: nn.Module, planned: Plan) -> list[tuple[Any, str, dict[str, Any] | None]]:
    """Return (config, activation, hf_glu entry) for each config around a converted site, as they are to be after it."""
    changed = {step.site.name: step for step in planned.steps if step.changes}
    owned: dict[int, tuple[Any, list[Site]]] = {}
    for site in find_sites(model):
        for config in enclosing_configs(model, site.name):
            if activation_field(config):
                owned.setdefault(id(config), (config, []))[1].append(site)
    return [
        _entry(config, sites, changed, planned.target)
        for config, sites in owned.values()
        if any(site.name in changed for site in sites)
    ]


def _entry(config: Any, sites: list[Site], changed: dict[str, Step], target: str) -> tuple[Any, str, Any]:
    steps = [changed[site.name] for site in sites if site.name in changed]
    old = GluConfig.of(config)
    gated = [site for site in sites if site.name in changed or site.activation]
    layers = _layers(gated, sites)
    if layers is None and all(site.native for site in sites):
        return config, native_gate(target), None  # the stock family has this itself, and needs no plugin to load it
    added = any(step.route.up_bias and step.site.in_proj.bias is None for step in steps if not step.site.native)
    options = GluConfig(
        dense_act=old.dense_act or steps[0].source, bias=True if added else old.bias, layers=layers
    )  # fmt: skip
    return config, target, options.to_dict()


def _layers(gated: list[Site], sites: list[Site]) -> LayerSpec:
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
