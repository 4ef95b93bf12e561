"""Maps of a cut that a slim model keeps as weights, because a norm acts before them.

Without a norm, ``q' = M_q W_q x`` and the product is one matrix. Behind a norm it is
``q' = M_q norm(W_q x)``, so W_q stays whole and each head keeps its M ``[kept, d_head]``: the key
cache shrinks as far as it would have, the weights grow by the maps.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from gainlens.ablation.cut import HeadMaps
from gainlens.export.families import SlimFamily

MAPS = "maps_after_norm"
"""Entry of a slim configuration: whether the model keeps the maps of its cut as weights."""


def norm_first(family: SlimFamily, config: Any) -> bool:
    """Whether a norm stands between the projections of a model and the maps of a cut."""
    return family.key_norm(config) is not None


def maps_follow(family: SlimFamily, config: Any, maps: HeadMaps | None) -> bool:
    """Whether a plan has maps that fold into no projection."""
    return maps is not None and norm_first(family, config)


def maps_after_norm(config: Any) -> bool:
    """Whether a slim model of this configuration keeps the maps of its cut as weights."""
    return bool(config.gainlens.get(MAPS))


def map_weights(slim: nn.Module) -> int:
    """How many weights the maps add to a slim model; 0 where there are none."""
    return sum(p.numel() for n, p in slim.named_parameters() if n.endswith(("q_map", "k_map")))


def mapped(
    x: Float[torch.Tensor, "batch pos head d_head"],
    maps: Float[torch.Tensor, "head width d_head"],
) -> Float[torch.Tensor, "batch pos head width"]:
    """One map per head, into the slots of a thin one."""
    return torch.einsum("bphd,hwd->bphw", x, maps.to(x.dtype))
