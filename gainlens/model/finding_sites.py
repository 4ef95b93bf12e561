"""``key_sites``: find and verify where a model keeps its keys, once per model.

A few tokens are run through the model. No configuration flag is trusted without a measurement; see
``gainlens.model.verify``.
"""

from __future__ import annotations

import weakref
from typing import Any

from gainlens.errors import InputError
from gainlens.model.sites import KeySites
from gainlens.model.verify import measure_sites

_CACHE: weakref.WeakKeyDictionary[Any, tuple[tuple[Any, ...], KeySites]] = (
    weakref.WeakKeyDictionary()
)


def key_sites(model: Any) -> KeySites:
    """Find and verify where ``model`` keeps its keys.

    Args:
        model: a TransformerLens ``TransformerBridge`` or ``HookedTransformer``.

    Returns:
        KeySites: measured once per model and then cached.

    Raises:
        InputError: ``model`` is not a TransformerLens model.
        UnsupportedModelError: its keys can't be probed or cut correctly; the message says why.
    """
    if not hasattr(model, "run_with_hooks") or not hasattr(model, "cfg"):
        raise InputError(
            f"model={type(model).__name__} is not a TransformerLens model: expected a "
            "TransformerBridge or a HookedTransformer (gainlens.load_model makes one)"
        )
    state = _mode(model)
    known = _CACHE.get(model)
    if known is None or known[0] != state:
        known = (state, measure_sites(model))
        _CACHE[model] = known
    return known[1]


def _mode(model: Any) -> tuple[Any, ...]:
    """Switches of a model that change the content of its hooks."""
    return (
        getattr(model, "compatibility_mode", None),
        getattr(model.cfg, "ungroup_grouped_query_attention", None),
        getattr(model.cfg, "use_split_qkv_input", None),
        getattr(model.cfg, "use_attn_in", None),
    )
