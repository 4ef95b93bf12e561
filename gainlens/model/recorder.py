"""Record a model's queries and keys before and after their rotation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch

from gainlens.model.hooks import Hook
from gainlens.model.rotation import Following
from gainlens.model.sites import KeySites, Stage

Letter = Literal["q", "k"]
Receive = Callable[[Letter, int, Stage, torch.Tensor], None]
"""Called with the letter, the layer, the stage and ``[batch, pos, head, d_head]``. The tensor may
be the model's own: do not modify it. Within a layer, keys may come before queries."""


def query_key_hooks(
    sites: KeySites,
    receive: Receive,
    *,
    stages: Sequence[Stage] = ("rotated",),
    letters: Sequence[Letter] = ("q", "k"),
    following: Following | None = None,
    detach: bool = True,
) -> list[Hook]:
    """Forward hooks that pass the queries and keys of every layer to ``receive``.

    If the model fires no hook after its rotation, the rotation is computed here.

    Args:
        sites: the model's key sites.
        receive: called with each tensor.
        stages: stages to record; without a rotation both are the same.
        letters: queries, keys, or both.
        following: the rotation of the same pass, if the caller needs it too; its hooks are
            included in the result.
        detach: detach the tensors from the autograd graph.
    """
    computed = "rotated" in stages and not sites.rotated_fires
    following = following if following is not None else sites.rotation.follow()

    def at(x: torch.Tensor, hook: Any, *, letter: Letter, layer: int, stage: Stage) -> None:
        x = x.detach() if detach else x
        if stage in stages:
            receive(letter, layer, stage, x)
        if computed:
            turned = following.turn(letter, layer, x.shape[1]).heads(x) if sites.rotary_dim else x
            receive(letter, layer, "rotated", turned)

    names = {"q": sites.query_hook, "k": sites.key_hook}
    wanted = dict.fromkeys(sites.hook_stage(stage) for stage in stages)
    return following.hooks() + [
        (names[letter](layer, stage), partial(at, letter=letter, layer=layer, stage=stage))
        for layer in range(sites.n_layers)
        for letter in letters
        for stage in wanted
    ]
