"""gainlens' own engine: the slim modelling code, any plan."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from gainlens.export.building import streamed_copy
from gainlens.export.engines.base import DTYPES, Engine
from gainlens.model.stored_weights import is_offloaded

SHARD = "1GB"
"""Size of a file of weights that are not in memory when they are written."""


class GainlensEngine(Engine):
    """Read back by ``AutoModelForCausalLM.from_pretrained`` after ``import gainlens``."""

    name = "gainlens"
    streams = True

    def check(self, slim: Any) -> None:
        """Accept every slim model."""

    def write(self, slim: Any, folder: Path, precision: str, tokenizer: Any | None) -> None:
        """``config.json``, ``model.safetensors`` and the tokenizer's files."""
        save(slim, folder, precision, tokenizer)

    def read_back(self, folder: Path, device_map: Any = None) -> Any:
        """Load with ``load_slim``."""
        import torch

        from gainlens.export.slim_model import load_slim

        return load_slim(folder, dtype=torch.float32, device_map=device_map)


def save(model: Any, folder: Path, precision: str, tokenizer: Any | None) -> None:
    """``save_pretrained`` in another precision without changing the model.

    A model whose weights are not in memory is written in shards of ``SHARD``, one in memory at a
    time.
    """
    dtype = DTYPES[precision]
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    if is_offloaded(model):
        copied = streamed_copy(model, dtype)
        state = {name: t for name, t in copied.state_dict().items() if name not in tied}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded")
            copied.save_pretrained(folder, state_dict=state, max_shard_size=SHARD)
        say_dtype(folder, precision)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return
    # Converted, tied weights share no memory, by which transformers would know them.
    state = {name: t.to(dtype) if t.is_floating_point() else t
             for name, t in model.state_dict().items() if name not in tied}  # fmt: skip
    model.save_pretrained(folder, state_dict=state)
    say_dtype(folder, precision)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def say_dtype(folder: Path, precision: str) -> None:
    """Put the dtype of the file into ``config.json``, where transformers writes the model's own."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    config |= dict.fromkeys(names, str(DTYPES[precision]).removeprefix("torch."))
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
