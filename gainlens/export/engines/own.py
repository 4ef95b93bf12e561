"""gainlens' own engine: the slim modelling code, any plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gainlens.export.engines.base import DTYPES, Engine


class GainlensEngine(Engine):
    """Read back by ``AutoModelForCausalLM.from_pretrained`` after ``import gainlens``."""

    name = "gainlens"

    def check(self, slim: Any) -> None:
        """Accept every slim model."""

    def write(self, slim: Any, folder: Path, precision: str, tokenizer: Any | None) -> None:
        """``config.json``, ``model.safetensors`` and the tokenizer's files."""
        save(slim, folder, precision, tokenizer)

    def read_back(self, folder: Path) -> Any:
        """Load with ``load_slim``."""
        import torch

        from gainlens.export.slim_model import load_slim

        return load_slim(folder, dtype=torch.float32)


def save(model: Any, folder: Path, precision: str, tokenizer: Any | None) -> None:
    """``save_pretrained`` in another precision without changing the model."""
    dtype = DTYPES[precision]
    state = {name: t.to(dtype) if t.is_floating_point() else t
             for name, t in model.state_dict().items()}  # fmt: skip
    before = model.config.dtype
    model.config.dtype = dtype
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config.dtype = before
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
