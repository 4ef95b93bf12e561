"""What the two TransformerLens kinds have in common: masking through their own hooks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int

from gainlens.ablation import KeyMask, RefitCut, SlotCut, ablation_hooks
from gainlens.export.after_norm import norm_first
from gainlens.export.slot_rotation import turned_by
from gainlens.export.sources.base import Flows, ProjectionMaps, Source, ValueMap
from gainlens.export.sources.huggingface import at_least_float, second_moment
from gainlens.model.families import Pairing
from gainlens.model.finding_sites import key_sites
from gainlens.model.hooks import Hook, attached
from gainlens.model.running import evaluating


class LensSource(Source):
    """A model with ``hook_k`` and ``hook_z``; see ``Source``."""

    def logits(
        self,
        tokens: Int[torch.Tensor, "document pos"],
        cut: ProjectionMaps | None = None,
        values: ValueMap | None = None,
    ) -> Float[torch.Tensor, "document pos vocab"]:
        """See ``Source``."""
        with torch.no_grad(), evaluating(self.model):
            hooks = self._cut_hooks(cut)
            for layer in range(self.n_layers if values is not None else 0):
                assert values is not None
                fn = partial(_project, maps=values[layer].to(self.device))
                hooks.append((f"blocks.{layer}.attn.hook_z", fn))
            with attached(self.model, hooks):
                out: torch.Tensor = self.model(tokens.to(self.device), return_type="logits")
        return at_least_float(out)

    def flows(self, batches: list[Int[torch.Tensor, "_ _"]], cut: ProjectionMaps | None) -> Flows:
        """See ``Source``."""
        n_layers, n_kv, d_head = self.shape
        sums = torch.zeros(n_layers, n_kv, d_head, d_head, dtype=torch.float64)
        count = 0

        def record(z: torch.Tensor, hook: Any, *, layer: int) -> None:
            sums[layer] += second_moment(z.flatten(2), n_kv, z.shape[2])

        with torch.no_grad(), evaluating(self.model):
            hooks = self._cut_hooks(cut)
            for layer in range(n_layers):
                hooks.append((f"blocks.{layer}.attn.hook_z", partial(record, layer=layer)))
            with attached(self.model, hooks):
                for batch in batches:
                    self.model(batch.to(self.device), return_type=None)
                    count += batch.numel()
        return sums / count

    def _cut_hooks(self, cut: ProjectionMaps | None) -> list[Hook]:
        if cut is None:
            return []
        # Sites are verified where nothing changes keys after the hook. A bound does, but not zeros.
        bounded = self.family.clip(self.config) is not None
        if cut.queries is None and not bounded:
            diagonal = torch.diagonal(cut.keys, dim1=-2, dim2=-1)
            if torch.equal(torch.diag_embed(diagonal), cut.keys):
                return list(ablation_hooks(self.model, KeyMask(diagonal > 0.5), "zero"))
        if norm_first(self.family, self.config):
            return list(self._after_norm(cut).hooks(self.model))
        return [
            (
                f"blocks.{layer}.attn.hook_{kind}",
                partial(
                    _project,
                    maps=maps[layer].to(self.device),
                    turn=cut.turn(layer),
                    pairing=cut.pairing,
                ),
            )
            for kind, maps in (("k", cut.keys), ("q", cut.queries))
            if maps is not None
            for layer in range(self.n_layers)
        ]

    def _after_norm(self, cut: ProjectionMaps) -> RefitCut:
        """The maps as a cut that acts on rotated queries and keys, which every norm has seen."""
        keys = cut.keys.transpose(2, 3)
        mask = KeyMask(torch.ones(self.shape, dtype=torch.bool))  # the maps have the zero rows
        if cut.queries is None:
            group = int(self.config.num_attention_heads) // keys.shape[1]
            queries = keys.repeat_interleave(group, 1)
        else:
            queries = cut.queries.transpose(2, 3)
        if cut.turns is None:
            return RefitCut(mask, queries, keys)
        own = key_sites(self.model).frequencies
        return SlotCut(mask, queries, keys, cut.turns + self.rotary_frequencies()[:, None], own)


def _project(
    x: Float[torch.Tensor, "batch pos head d"],
    hook: Any,
    *,
    maps: Float[torch.Tensor, "kv_head d d"],
    turn: Float[torch.Tensor, "_ pair"] | None = None,
    pairing: Pairing = "half",
) -> Float[torch.Tensor, "batch pos head d"]:
    wide = maps.to(x.dtype).repeat_interleave(x.shape[2] // len(maps), 0)
    new = torch.einsum("bphd,hde->bphe", x, wide)
    return new if turn is None else turned_by(new, turn, pairing)
