"""Sweeps of ablations: points, evaluation, curve, resume."""
