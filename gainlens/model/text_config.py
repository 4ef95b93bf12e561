"""Find the language model settings in a configuration."""

from __future__ import annotations

from typing import Any


def text_config(config: Any) -> Any:
    """The part of a transformers configuration that holds ``vocab_size``, heads and layers.

    Text-only models keep them at the top level, multimodal models in ``text_config`` (or another
    name that transformers knows).

    Args:
        config: configuration of a transformers model.
    """
    inner = getattr(config, "get_text_config", None)
    return config if inner is None else inner(decoder=True)
