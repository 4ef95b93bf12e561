"""``KeyCache``: the keys of one run, for use in another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

from gainlens.brief import brief
from gainlens.data.batches import Tokens, as_documents
from gainlens.errors import InputError, SilentSiteError
from gainlens.model.finding_sites import key_sites
from gainlens.model.forward import forward_layers
from gainlens.model.hooks import attached
from gainlens.model.recorder import query_key_hooks
from gainlens.model.sites import STAGES, KeySites, Stage


@dataclass(frozen=True, eq=False)
class KeyCache:
    """The keys of every layer in one run.

    Attributes:
        keys: one tensor per layer, ``[document, pos, kv_head, d_head]``, in activation units.
        stage: where the keys were recorded.
    """

    keys: list[Float[torch.Tensor, "document pos kv_head d_head"]]
    stage: Stage = "rotated"

    __repr__ = brief

    @property
    def n_documents(self) -> int:
        """Documents in the run."""
        return self.keys[0].shape[0]

    @property
    def n_pos(self) -> int:
        """Positions in the run."""
        return self.keys[0].shape[1]

    def check(self, sites: KeySites, stage: Stage) -> None:
        """Raise ``InputError`` unless the keys match ``sites`` and were recorded at ``stage``."""
        if self.stage != stage:
            raise InputError(
                f"cache was read at stage={self.stage!r}: this cut acts at {stage!r}, expected the "
                "same"
            )
        shapes = {tuple(keys.shape[2:]) for keys in self.keys}
        if len(self.keys) != sites.n_layers or shapes != {sites.shape[1:]}:
            raise InputError(
                f"cache is of another model: it holds {len(self.keys)} layers of [kv_head, d_head]"
                f" = {sorted(shapes)}, this model ({sites.architecture}) has {sites.n_layers} of "
                f"{sites.shape[1:]}"
            )

    @classmethod
    def run(cls, model: Any, tokens: Tokens, stage: Stage = "rotated") -> KeyCache:
        """Run ``model`` on ``tokens`` and keep its keys.

        If the model has no hook after its rotation, the rotation is computed here.

        Raises:
            InputError: documents of unequal length, an unknown stage.
            SilentSiteError: the hook of a layer did not fire.
        """
        if stage not in STAGES:
            raise InputError(f"stage={stage!r} is not one of {', '.join(STAGES)}")
        sites = key_sites(model)
        batch = one_length(tokens, int(model.cfg.d_vocab), "tokens")
        found: dict[int, torch.Tensor] = {}

        def record(letter: str, layer: int, at: Stage, keys: torch.Tensor) -> None:
            found[layer] = keys.clone()

        hooks = query_key_hooks(sites, record, stages=(stage,), letters=("k",))
        with attached(model, hooks):
            forward_layers(model, batch)
        silent = [layer for layer in range(sites.n_layers) if layer not in found]
        if silent:
            raise SilentSiteError(f"the key hooks of layer(s) {silent} did not fire")
        return cls([found[layer] for layer in range(sites.n_layers)], stage)


def one_length(tokens: Tokens, vocabulary: int, name: str) -> Int[torch.Tensor, "document pos"]:
    """Tokens as one batch.

    Args:
        tokens: documents, checked as in ``batches``.
        vocabulary: size of the vocabulary of the model.
        name: name of the argument, for the error message.

    Raises:
        InputError: documents of unequal length.
    """
    documents = as_documents(tokens, vocabulary)
    lengths = sorted({len(document) for document in documents})
    if len(lengths) > 1:
        raise InputError(
            f"{name} has documents of {lengths[0]} to {lengths[-1]} tokens: expected one length"
        )
    return torch.stack(documents)
