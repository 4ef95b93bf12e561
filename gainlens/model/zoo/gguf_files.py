"""GGUF files as checkpoints: dequantised once, into the user's cache.

transformers reads GGUF, but takes a minute for a small model and does so again for every load,
once for the weights and once for the tokenizer. So the first load writes an ordinary checkpoint
folder (float32, which holds every dequantised value exactly), and later loads read that folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gainlens.errors import GainlensError, InputError
from gainlens.model.wrapping import first_line
from gainlens.model.zoo.cache import cached_folder

LAYOUT = 1
"""Raise by one when what is written into the cache changes."""
MAGIC = b"GGUF"
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
"""How llama.cpp names the parts of a file that it splits."""
WEIGHTS = ("*.safetensors", "*.bin")
BLOCK = 1 << 22


def gguf_at(path: Path) -> Path | None:
    """The GGUF file that ``path`` names: itself, or the only one in a folder without weights.

    Raises:
        InputError: the folder holds several GGUF files and nothing else to load.
    """
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" or _magic(path) == MAGIC else None
    if not path.is_dir() or any(file for kind in WEIGHTS for file in path.glob(kind)):
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise InputError(
            f"folder {str(path)!r} holds {len(found)} GGUF files; name one, "
            f"such as {str(found[0])!r}"
        )
    return found[0] if found else None


def cached_checkpoint(parts: Sequence[Path], name: str, prefix: str = "gguf") -> Path:
    """Checkpoint folder in the user's cache with the dequantised weights of a GGUF file.

    Args:
        parts: the file, or the pieces that make it when written one after another.
        name: the model's name for error messages.
        prefix: start of the cache folder's name. The rest is the file's own hash, so another
            release of a package, or another file of the same name, never reuses a folder.

    Returns:
        A folder with ``config.json``, ``model.safetensors`` (float32) and the tokenizer.

    Raises:
        InputError: the file is not GGUF, is truncated or one part of several, its architecture
            is unknown to transformers, weights are missing from it, ``gguf`` is not installed,
            or the cache can't be written.
    """
    check_header(parts[0], name)
    folder = f"{prefix}-{LAYOUT}-{digest(parts)[:16]}"
    return cached_folder(folder, lambda made: _fill(parts, made, name))


def check_header(file: Path, name: str) -> None:
    """Raise ``InputError`` if ``file`` is not the whole of a GGUF file, before it is read."""
    if _magic(file) != MAGIC:
        raise InputError(f"model {name!r}: {str(file)!r} is not a GGUF file (wrong first bytes)")
    if part := PART.search(file.name):
        raise InputError(
            f"model {name!r}: {file.name!r} is part {int(part[1])} of {int(part[2])}; join them "
            "first: llama-gguf-split --merge"
        )


def digest(parts: Sequence[Path]) -> str:
    """SHA-256 of the file that the parts make, in hexadecimal digits."""
    total = hashlib.sha256()
    for part in parts:
        with part.open("rb") as handle:
            while block := handle.read(BLOCK):
                total.update(block)
    return total.hexdigest()


def dequantise(gguf: Path, folder: Path, name: str) -> None:
    """Write ``config.json``, ``model.safetensors`` (float32) and the tokenizer of ``gguf``."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"model {name!r} is a GGUF file; reading it needs: pip install gguf")
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except GainlensError:
        raise
    except Exception as error:  # of numpy, gguf and transformers: a truncated file has many
        raise InputError(
            f"model {name!r}: GGUF file can't be read ({type(error).__name__}: "
            f"{first_line(error)}); it is truncated, or of an architecture that transformers "
            "doesn't read"
        ) from error
    # transformers only logs missing weights and fills them with random numbers.
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"model {name!r}: {len(missing)} weights are missing from its GGUF file, "
            f"starting with {missing[0]!r}"
        )
    settings = model.config.to_dict()
    # Says that the weights are still GGUF; with it the folder would not load.
    settings.pop("quantization_config", None)
    settings["architectures"] = [type(model).__name__]
    type(model.config)(**settings).save_pretrained(folder)
    weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    _tokenizer(gguf, folder, name)


def _tokenizer(gguf: Path, folder: Path, name: str) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False
        )
    except Exception as error:  # hooks need only the weights
        warnings.warn(
            f"model {name!r}: the tokenizer in its GGUF file can't be read "
            f"({type(error).__name__}: {first_line(error)}); pass tokens instead of text",
            stacklevel=2,
        )
        return
    tokenizer.save_pretrained(folder)


def _fill(parts: Sequence[Path], folder: Path, name: str) -> None:
    if len(parts) == 1:
        dequantise(parts[0].absolute(), folder, name)
        return
    joined = folder / "joined.gguf"
    try:
        with joined.open("wb") as whole:
            for part in parts:
                with part.open("rb") as handle:
                    while block := handle.read(BLOCK):
                        whole.write(block)
        dequantise(joined, folder, name)
    finally:
        joined.unlink(missing_ok=True)


def _magic(file: Path) -> bytes:
    try:
        with file.open("rb") as handle:
            return handle.read(len(MAGIC))
    except OSError:
        return b""
