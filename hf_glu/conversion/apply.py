"""Carrying a plan out, in place, and measuring what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_glu.activation import build_elementwise, registry
from hf_glu.activation.context import watch_context
from hf_glu.activation.learnable import LearnableMix
from hf_glu.activation.module import innermost
from hf_glu.activation.wrapped import shifts
from hf_glu.config.glu import GluConfig
from hf_glu.config.registry import GATED, core
from hf_glu.conversion.checks import check_values
from hf_glu.conversion.config_entries import config_entries
from hf_glu.conversion.fit.calibration import Batches, make_batches, site_inputs
from hf_glu.conversion.fit.fitting import Fit, FitOptions, constant_direction, contributions, fit, outputs_of
from hf_glu.conversion.made import note_making
from hf_glu.conversion.measure import Comparison
from hf_glu.conversion.planning import flagged
from hf_glu.conversion.report import Report, SiteReport
from hf_glu.conversion.routes import APPROXIMATE
from hf_glu.conversion.steps import Plan, Step
from hf_glu.errors import OptionError
from hf_glu.ffn.build import configure, give_dense_configs, native_gate
from hf_glu.ffn.context_sites import place_parts
from hf_glu.ffn.forward import ffn_output, ffn_units, projections
from hf_glu.ffn.linear import set_rows, weight_rows
from hf_glu.ffn.mixers import gate_of, own_gate
from hf_glu.ffn.sites import Site


def carry_out(
    model: Any, planned: Plan, calibration: Any, tokenizer: Any, distill_steps: int | None,
    inputs: Mapping[str, Any] | None, check: bool | str,
) -> Report:  # fmt: skip
    """Carry a plan out, in place; see `hf_glu.convert`."""
    fitted = calibration is not None
    check_values(model)
    entries = config_entries(model, planned)
    if not fitted and any(step.needs_fit for step in planned.steps):
        raise OptionError("fewer hidden units, or no bias, need calibration=: texts or tensors to fit the FFNs on")
    batches = None if calibration is None else make_batches(model, calibration, tokenizer)
    comparison = Comparison(model, [step.site for step in planned.steps], inputs, check=check) if check else None
    fits = {
        step.site.name: _convert_site(model, step, planned.options, batches, distill_steps)
        for step in tqdm(planned.steps, desc="fitting FFNs", disable=not fitted, leave=False)
        if step.changes
    }
    for entry in entries:
        entry.write()
    place_parts(model, flagged(planned.steps), planned.options)
    watch_context(model)
    give_dense_configs(model, planned.steps[0].source)
    differences, errors = comparison.finish(planned.promise) if comparison else (None, {})
    reports = [(step, errors.get(step.site.name), fits.get(step.site.name)) for step in planned.steps]
    sites = tuple(SiteReport(step=step, relative_error=error, fit=fitted) for step, error, fitted in reports)
    return Report(plan=planned, sites=sites, differences=differences)


def _convert_site(
    model: Any, step: Step, options: GluConfig, batches: Batches | None, distill_steps: int | None
) -> Fit | None:
    """Convert one site, and fit it where its route is approximate and there are calibration data."""
    site = step.site
    if batches is None or step.route.promise != APPROXIMATE or site.kind == "experts":
        _apply(step, None, options)
        return None
    x = site_inputs(model, site, batches)
    dtypes = [module.weight.dtype for module in projections(site)]
    for module in projections(site):  # copies: what is fitted is written into
        bias = None if module.bias is None else module.bias.detach().clone().float()
        set_rows(module, weight_rows(module).detach().clone().float(), bias)
    old = outputs_of(partial(ffn_output, site), x)
    kept = _best_units(site, x, step.width) if step.narrows else None
    _apply(step, kept, options)
    if step.unbiased:
        _set_up_rows(site, constant_direction(x))
    steps = (FitOptions.steps if step.needs_fit else 0) if distill_steps is None else distill_steps
    result = fit(site, x, old, FitOptions(steps=steps))
    for module, dtype in zip(projections(site), dtypes, strict=True):
        module.to(dtype)
    site.act.to(dtypes[0])
    return result


def _set_up_rows(site: Site, row: Tensor) -> None:
    """Give every unit the same up row."""
    gate, up = weight_rows(site.in_proj).chunk(2)
    set_rows(site.in_proj, torch.cat([gate, row.to(up).expand_as(up)]), site.in_proj.bias)


def _best_units(site: Site, x: Tensor, width: int) -> Tensor:
    """Return the indices of the units that add most to the output."""
    power = contributions(partial(ffn_units, site), weight_rows(site.out_proj), x)
    return power.topk(width).indices.sort().values


@torch.no_grad()
def _apply(step: Step, kept: Tensor | None, options: GluConfig) -> None:
    """Convert one site; ``kept`` are the units that stay (None: all)."""
    site, target = step.site, step.target
    if kept is not None:
        _keep_units(site, kept)
    own = gate_of(site.anchor) if site.kind == "mixer" else None
    old = build_elementwise(own) if own else site.act
    if GATED in registry[target].flags and not site.native and not site.activation:
        _widen(site, step)
        note_making(site)
    if site.native or site.activation != target:
        act = build_elementwise(native_gate(target)) if site.native else registry[target].factory()
        site.set_act(act.to(device=_device(site), dtype=_dtype(site)).train(old.training))
        _start_at(step, old, options)
    if site.kind == "mixer":
        own_gate(site.anchor)


def _start_at(step: Step, old: nn.Module, options: GluConfig) -> None:
    """Hand the old activation itself on to the new one, where that contains it: it may have trained parameters."""
    site = step.site
    configure(site, options)
    had: dict[type[nn.Module], nn.Module] = {type(shift): shift for shift in shifts(old)}
    for module in site.act.modules():
        for name, part in module.named_children():
            if type(part) in had:  # more wrappers around what is wrapped already
                setattr(module, name, had[type(part)])
    owner, inner = innermost(site.act)
    before = innermost(old)[1]
    if core(step.source) == core(step.target) and owner is not None:
        owner.phi = before
    elif isinstance(inner, LearnableMix):
        inner.start_at(core(step.source), before)


def _device(site: Site) -> torch.device:
    return next(site.anchor.parameters()).device


def _dtype(site: Site) -> torch.dtype:
    return next(site.anchor.parameters()).dtype


def _keep_units(site: Site, kept: Tensor) -> None:
    """Drop all other units: their rows in the in-projections (in both halves of a packed one), their out-columns."""
    *ins, out_proj = projections(site)
    halves = torch.cat([kept, kept + site.width]) if site.widened or site.kind == "packed" else kept
    for module in ins:
        set_rows(module, weight_rows(module)[halves], None if module.bias is None else module.bias[halves])
    set_rows(out_proj, weight_rows(out_proj)[:, kept], out_proj.bias)


def _widen(site: Site, step: Step) -> None:
    """Turn a dense site's in-projection into ``[gate | up]`` by its route's formula."""
    in_proj, route = site.in_proj, step.route
    rows, bias = weight_rows(in_proj), in_proj.bias
    if step.adds_bias:
        bias = torch.zeros_like(rows[:, 0])
    set_rows(in_proj, route.widen(rows, bias=False), None if bias is None else route.widen(bias, bias=True))
