"""The report page: claims, sections and figures of one model, as HTML."""

from gainlens.report.build import Plan, build_report
from gainlens.report.compare import compare_reports

__all__ = ["Plan", "build_report", "compare_reports"]
