"""Intervals, stopping rules and verdicts, independent of any model."""
