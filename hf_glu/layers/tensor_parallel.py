"""Tensor parallelism of widened sites.

A column-wise split of ``[gate | up]`` would give each device rows of one half only. Transformers' packed split handles
the weight but not a bias, so a widened site is left out of the plan: it is replicated, which is right on any number of
devices, and saves no memory there.
"""

from __future__ import annotations

from typing import Any

from hf_glu.layers.sites import Site


def replicate_widened(model: Any, sites: list[Site]) -> None:
    """Drop the entries for the projections of ``sites`` from the model's tensor-parallel plan."""
    plan = getattr(model, "_tp_plan", None)
    if not plan or not sites:
        return
    names = {path for site in sites for path in site.parts}
    generic = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    generic |= {name.removeprefix(prefix) for name in generic} | {prefix + name for name in generic}
    model._tp_plan = {pattern: style for pattern, style in plan.items() if pattern not in generic}
