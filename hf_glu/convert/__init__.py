"""Pretrained dense models into gated ones: plan, apply, report."""

from hf_glu.convert.apply import convert
from hf_glu.convert.planning import Plan, plan
from hf_glu.convert.report import Report

__all__ = ["Plan", "Report", "convert", "plan"]
