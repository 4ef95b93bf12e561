"""Check a configuration's sizes before building the model, so a bad file can't exhaust memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gainlens.errors import FileFormatError
from gainlens.files import read_json
from gainlens.files.schema import MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Mismatch, whole

MAX_CONFIG = 16 << 20
"""Maximum size of a ``config.json`` in bytes."""
SIZES = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), MAX_LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), MAX_HEADS),
    **dict.fromkeys(("head_dim", "v_head_dim"), MAX_WIDTH),
    **dict.fromkeys(("hidden_size", "intermediate_size", "n_embd", "n_inner"), 1 << 24),
    "vocab_size": 1 << 28,
}
"""Maximum value of each setting, under all of its names."""


def check_config(folder: str | Path) -> dict[str, Any]:
    """The settings in a checkpoint's ``config.json``.

    Raises:
        FileFormatError: the file is missing, too large or nested too deeply, or has impossible
            sizes.
    """
    file = Path(folder) / "config.json"
    found = read_json(file, MAX_CONFIG)
    if not isinstance(found, dict):
        raise FileFormatError(f"{file} is not a configuration: it holds no JSON object")
    try:
        _check_sizes(found, "")
    except Mismatch as error:
        raise FileFormatError(f"{file} does not describe a valid model: {error}") from None
    return found


def _check_sizes(settings: dict[str, Any], where: str) -> None:
    for name, value in settings.items():
        if name in SIZES and isinstance(value, int):
            whole(0, SIZES[name])(value, f"{where}{name}")
        elif isinstance(value, dict):
            _check_sizes(value, f"{where}{name}.")
