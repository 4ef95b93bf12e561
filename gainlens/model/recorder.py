"""The one recorder of a model's queries and keys, before and after their rotation."""

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
"""Called with the letter, the layer, the stage and ``[batch, pos, head, d_head]``; the
tensor may be the model's own and is not to be written. Of a layer, queries may come after keys."""


def query_key_hooks(
    sites: KeySites,
    receive: Receive,
    *,
    stages: Sequence[Stage] = ("rotated",),
    letters: Sequence[Letter] = ("q", "k"),
    following: Following | None = None,
    detach: bool = True,
) -> list[Hook]:
    """Forward hooks that hand over what every layer computes.

    Where the model fires no hook after its rotation, the rotation is followed and computed here.

    Args:
        sites: of the model.
        receive: takes each tensor as it comes.
        stages: which to hand over; without a rotation both are the same.
        letters: queries, keys, or both.
        following: of the same pass, where the caller needs its turns too; its hooks are among
            those returned.
        detach: hand the tensors over without their graph.
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
