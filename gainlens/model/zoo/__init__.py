"""Trained models that come inside Python packages, so that no hub is needed."""

from __future__ import annotations

from collections.abc import Callable

from gainlens.model.zoo import gemma3, gguf_files, smollm2, tiny

CHECKPOINTS: dict[str, Callable[[], str]] = {
    gemma3.NAME: gemma3.checkpoint,
    smollm2.NAME: smollm2.checkpoint,
}
"""What gives the folder (or the id) of each packaged model that is an ordinary checkpoint."""
PACKAGED = (*sorted((*CHECKPOINTS, "tiny")),)
"""Names that ``load_model`` knows. ``tiny`` is made in memory."""

__all__ = ["CHECKPOINTS", "PACKAGED", "gemma3", "gguf_files", "smollm2", "tiny"]
