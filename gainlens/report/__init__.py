"""The page: claims, sections and figures of one model, for a browser."""

from gainlens.report.build import Plan, build_report

__all__ = ["Plan", "build_report"]
