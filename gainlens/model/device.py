"""Where a model takes its tokens."""

from __future__ import annotations

from typing import Any

import torch


def model_device(model: Any) -> torch.device:
    """The device to which token ids of ``model`` go."""
    found: torch.device = next(model.parameters()).device
    return found
