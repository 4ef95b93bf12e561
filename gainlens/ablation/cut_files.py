"""Validation of cut files, before a cut is built from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float

from gainlens.files.schema import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_WIDTH,
    Mismatch,
    check_names,
    check_tensor,
    facts,
)


def check_mask_file(tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Check the content of a mask file.

    Args:
        tensors: only ``keep``, boolean ``[layer, kv_head, d_head]``.
        about: the facts of the mask.

    Raises:
        Mismatch: wrong type, shape or size, or a missing or unknown entry.
    """
    check_names(tensors, ("keep",))
    _check_keep(tensors["keep"])
    facts(about, "facts")


def check_refit_file(tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Check the content of a refitted cut's file.

    Args:
        tensors: ``keep``, ``query_maps`` ``[layer, head, d_head, d_head]`` and ``key_maps``
            ``[layer, kv_head, d_head, d_head]``.
        about: the facts of the cut; those of the fit are under ``refit``.

    Raises:
        Mismatch: as for a mask. ``RefitCut`` checks which dimensions the maps write to.
    """
    check_names(tensors, ("keep", "query_maps", "key_maps"))
    _check_mapped(tensors)
    facts(about, "facts")
    facts(about["refit"], "facts of the refit")


def check_slots_file(tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Check what a file of slots holds.

    Args:
        tensors: as for a refitted cut; ``frequencies`` and ``assigned``
            ``[layer, kv_head, rotary_pair]``, and ``own`` ``[layer, rotary_pair]``.
        about: its facts, those of the slots under ``slots``.

    Raises:
        Mismatch: as for a mask; a slot that was given a pair that is none. Maps and frequencies
            are checked by ``SlotCut``.
    """
    check_names(tensors, ("keep", "query_maps", "key_maps", "frequencies", "own", "assigned"))
    keep, assigned = _check_mapped(tensors), tensors["assigned"]
    n_layers, n_kv_heads, _ = keep.shape
    check_tensor(tensors["own"], "own", torch.float64, (n_layers, None))
    by_pair = (n_layers, n_kv_heads, tensors["own"].shape[1])
    check_tensor(tensors["frequencies"], "frequencies", torch.float64, by_pair)
    check_tensor(assigned, "assigned", torch.int64, by_pair)
    if bool((assigned < -1).any()) or bool((assigned >= by_pair[2]).any()):
        raise Mismatch(f"assigned names a pair outside -1 .. {by_pair[2] - 1}")
    facts(about, "facts")
    facts(about["slots"], "facts of the slots")


def check_maps(
    keep: Bool[torch.Tensor, "layer kv_head d_head"],
    query_maps: Float[torch.Tensor, "layer head d_head d_head2"],
    key_maps: Float[torch.Tensor, "layer kv_head d_head d_head2"],
) -> None:
    """Raise ``Mismatch`` if maps are not finite or write to a dimension that the mask cuts.

    Such a cut would report dimensions as removed that still contribute to the logits.
    """
    n_heads, n_kv_heads = query_maps.shape[1], key_maps.shape[1]
    if n_heads == 0 or n_heads % n_kv_heads:
        raise Mismatch(f"{n_heads} query heads is not a multiple of {n_kv_heads} key heads")
    by_query = keep.repeat_interleave(n_heads // n_kv_heads, 1)
    for name, maps, kept in (("query", query_maps, by_query), ("key", key_maps, keep)):
        if not bool(torch.isfinite(maps).all()):
            raise Mismatch(f"{name} maps contain NaN or infinity; expected finite numbers")
        written = (maps != 0).any(-1) & ~kept
        if bool(written.any()):
            layer, head, dim = (int(i) for i in written.nonzero()[0])
            raise Mismatch(
                f"the map of {name} head {head} of layer {layer} writes dimension {dim}, which "
                "the mask cuts"
            )


def _check_mapped(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Check mask and maps, and return the mask."""
    keep, queries, keys = (tensors[n] for n in ("keep", "query_maps", "key_maps"))
    _check_keep(keep)
    n_layers, n_kv_heads, d = keep.shape
    check_tensor(queries, "query_maps", keys.dtype, (n_layers, None, d, d))
    check_tensor(keys, "key_maps", keys.dtype, (n_layers, n_kv_heads, d, d))
    if not keys.dtype.is_floating_point:
        raise Mismatch(f"its maps are {keys.dtype}, expected a floating point type")
    return keep


def _check_keep(keep: torch.Tensor) -> None:
    check_tensor(keep, "keep", torch.bool, (None, None, None))
    for size, most in zip(keep.shape, (MAX_LAYERS, MAX_HEADS, MAX_WIDTH), strict=True):
        if not 1 <= size <= most:
            raise Mismatch(f"keep has shape {tuple(keep.shape)}, which no model can have")
