"""The report of a run, a suite or a comparison: one HTML page by itself, and its figures as PNG files."""

from __future__ import annotations

from hf_glu.publishing.report.page import write_report

__all__ = ["write_report"]
