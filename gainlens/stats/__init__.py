"""Intervals, stopping rules and verdicts. Nothing here knows a model."""
