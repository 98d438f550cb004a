"""Pretrained dense models into gated ones: plan, apply, report. A new way to convert is a `Change`."""

from hf_glu.conversion.changes.freeze import freeze_mix
from hf_glu.conversion.changes.revert import revert
from hf_glu.conversion.changes.t5_layout import to_native
from hf_glu.conversion.converting import convert, plan
from hf_glu.conversion.engine import Plan
from hf_glu.conversion.experts.growing.experts import Grow, grow_experts
from hf_glu.conversion.experts.merging.models import Merge, merge_experts
from hf_glu.conversion.experts.splitting.ffns import Split, split_experts
from hf_glu.conversion.report import Report
from hf_glu.conversion.steps import CHANGES, Change, Step

__all__ = [
    "CHANGES",
    "Change",
    "Grow",
    "Merge",
    "Plan",
    "Report",
    "Split",
    "Step",
    "convert",
    "freeze_mix",
    "grow_experts",
    "merge_experts",
    "plan",
    "revert",
    "split_experts",
    "to_native",
]
