"""Where a configuration keeps the settings of its language model."""

from __future__ import annotations

from typing import Any


def text_config(config: Any) -> Any:
    """The part of a transformers configuration that holds ``vocab_size``, heads and layers.

    Models of text alone keep them at the top, multimodal ones in ``text_config`` (or another
    name that transformers knows).

    Args:
        config: of a transformers model.
    """
    inner = getattr(config, "get_text_config", None)
    return config if inner is None else inner(decoder=True)
