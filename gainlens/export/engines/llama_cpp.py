"""GGUF files for llama.cpp without any code of gainlens. The plan decides the architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gainlens.errors import InputError
from gainlens.export.engines import gguf_llama, gguf_step35, llama_cpp_itself
from gainlens.export.engines.base import Engine
from gainlens.export.engines.gguf_file import (
    FILE,
    GgufFile,
    add_vocabulary,
    gguf_package,
    stored_as,
    vocabulary,
    write_out,
)
from gainlens.export.engines.gguf_llama import llama_from_gguf
from gainlens.export.engines.gguf_step35 import step35_from_gguf
from gainlens.export.engines.stock import check_plain, check_stock, query_fold, values_as_keys

READERS = {gguf_llama.ARCH: llama_from_gguf, gguf_step35.ARCH: step35_from_gguf}


class LlamaCppEngine(Engine):
    """llama.cpp; ``tokenizer`` is a GGUF file whose vocabulary is copied (needed for serving).

    If values are as wide as keys, the architecture is ``llama``, otherwise ``step35``. The CUDA
    flash attention of llama.cpp supports heads of 40, 64, 72, 80, 96, 112, 128 and 256 dimensions.
    Other widths run without it.
    """

    name = "llama.cpp"
    precisions = ("f32", "f16", "q8_0")
    reads_gguf = True

    def check(self, slim: Any) -> None:
        """Raise ``EngineLimitError`` unless the model fits one of llama.cpp's architectures."""
        check_stock(slim, self.name, None, silu_only=True, wide_values=True)
        if not values_as_keys(slim.config):
            check_plain(slim, self.name, f"architecture {gguf_step35.ARCH}", "qkvo")
        gguf_package()

    def notes(self, slim: Any) -> tuple[str, ...]:
        """Limits of the architecture for wide values."""
        return () if values_as_keys(slim.config) else gguf_step35.NOTES

    def check_tokenizer(self, tokenizer: Any | None, n_tokens: int) -> None:
        """Raise ``InputError`` unless it is None or a GGUF file with as many tokens."""
        if tokenizer is None:
            return
        found = [v for name, v, *_ in vocabulary(tokenizer) if name == "tokenizer.ggml.tokens"]
        if len(found) != 1:
            raise InputError(f"tokenizer={str(tokenizer)!r} is a GGUF file without a vocabulary")
        if len(found[0]) != n_tokens:
            raise InputError(
                f"tokenizer={str(tokenizer)!r} has {len(found[0])} tokens, the model {n_tokens}"
            )

    def write(self, slim: Any, folder: Path, precision: str, tokenizer: Any | None) -> None:
        """``model.gguf``."""
        narrow = values_as_keys(slim.config)
        arch = gguf_llama.ARCH if narrow else gguf_step35.ARCH
        writer = gguf_package().GGUFWriter(str(folder / FILE), arch)
        try:
            add_vocabulary(writer, tokenizer)
            add = gguf_llama.add_llama if narrow else gguf_step35.add_step35
            add(writer, slim, precision)
            write_out(writer)
        finally:
            writer.close()

    def round(self, tensor: torch.Tensor, precision: str) -> torch.Tensor:
        """Quantise and dequantise. Each row is quantised alone, so their order does not matter."""
        if tensor.ndim == 1:
            return tensor
        gguf = gguf_package()
        kind = stored_as(precision, tuple(tensor.shape), gguf)
        stored = gguf.quants.quantize(np.ascontiguousarray(tensor.numpy()), kind)
        return torch.from_numpy(gguf.quants.dequantize(stored, kind).astype(np.float32))

    def query_fold(self, slim: Any) -> float:
        """The softmax scale of the full head."""
        return query_fold(slim)

    def fault(self, folder: Path, model: Any, precision: str) -> str | None:
        """See ``Engine.fault``; a file without a vocabulary can't be served."""
        file = folder / FILE
        if not llama_cpp_itself.installed():
            return None
        if not any(name == "tokenizer.ggml.tokens" for name, *_ in vocabulary(file)):
            return None
        return llama_cpp_itself.fault(file, model, precision)

    def read_back(self, folder: Path, device_map: Any = None) -> Any:
        """Read with gguf into a transformers Llama that takes its frequencies from the file."""
        return READERS[GgufFile(folder / FILE).arch](folder / FILE)
