"""Tensor parallelism of widened sites, of activations with parameters of each unit, and of experts.

A column-wise split of ``[gate | up]`` would give each device rows of one half only. Transformers' packed split handles
the weight but not a bias, no plan splits an activation's own parameters (``stateful_``, ``canon_``, ``modulated_``),
and no split of a dense FFN fits the experts in its place: all are left out of the plan, that is replicated, which is
right on any number of devices, and saves no memory there. So is an FFN whose activation reads all channels of a token
(``polynorm``), or whose projections leave entries of theirs out.
"""

from __future__ import annotations

from typing import Any

from hf_glu.compat.of_models import TP_PLAN
from hf_glu.ffn.expert_sites import FirstOnly
from hf_glu.ffn.experts import ExpertFFN
from hf_glu.ffn.sites import Site


def replicate(model: Any, widened: list[Site]) -> None:
    """Drop the entries for the projections that no split fits, and for experts, from a model's tensor-parallel plan."""
    plan = TP_PLAN.of(model, None)
    names = {path for site in widened for path in site.parts}
    names |= {name for name, module in model.named_modules() if isinstance(module, (ExpertFFN, FirstOnly))}
    if not plan or not names:
        return
    generic = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    generic |= {name.removeprefix(prefix) for name in generic} | {prefix + name for name in generic}
    below = tuple(f"{name}." for name in generic)
    kept = {
        pattern: style for pattern, style in plan.items() if pattern not in generic and not pattern.startswith(below)
    }
    TP_PLAN.put(model, kept)
