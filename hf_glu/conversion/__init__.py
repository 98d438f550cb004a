"""Pretrained dense models into gated ones: plan, apply, report."""

from hf_glu.conversion.converting import convert
from hf_glu.conversion.experts.splitting import split_experts
from hf_glu.conversion.freeze import freeze_mix
from hf_glu.conversion.planning import Plan, plan
from hf_glu.conversion.report import Report
from hf_glu.conversion.revert import revert
from hf_glu.conversion.t5_layout import to_native

__all__ = ["Plan", "Report", "convert", "freeze_mix", "plan", "revert", "split_experts", "to_native"]
