"""The small real model as a folder of several files of weights."""

from __future__ import annotations

from pathlib import Path

from gainlens.model.loading import load_hf, load_tokenizer


def sharded_tiny(where: Path) -> Path:
    """Write the model and its tokenizer into ``where``, in four files of weights."""
    load_hf("tiny").save_pretrained(where, max_shard_size="1MB")
    load_tokenizer("tiny").save_pretrained(where)
    assert len(list(where.glob("*.safetensors"))) == 4
    return where
