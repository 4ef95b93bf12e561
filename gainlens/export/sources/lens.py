"""What the two TransformerLens kinds have in common: masking through their own hooks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int

from gainlens.ablation import KeyMask, ablation_hooks
from gainlens.export.slot_rotation import turned_by
from gainlens.export.sources.base import Flows, ProjectionMaps, Source, ValueMap
from gainlens.export.sources.huggingface import at_least_float, second_moment
from gainlens.model.families import Pairing
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
