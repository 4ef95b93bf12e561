"""Trained models that come inside Python packages, so that no hub is needed."""

from __future__ import annotations

from gainlens.model.zoo import smollm2, tiny

__all__ = ["smollm2", "tiny"]
