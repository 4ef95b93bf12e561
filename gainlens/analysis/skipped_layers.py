"""A bridge run from a block on: the blocks before it hand the residual through, uncomputed.

transformer-lens 3.9 can't start a bridge at a layer, and 4 runs the layers before all the same and
drops what they give. Here their ``forward`` is replaced for the time of one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int

SAME = 1e-4
"""Largest difference of a logit, over the largest one, that counts as the same run."""


class Prefix:
    """What each block of a bridge reads in a run of one prompt.

    Args:
        bridge: a TransformerBridge; its hooks run as ever in the blocks that are computed.

    Attributes:
        residuals: ``[document, pos, d_model]`` per block, of the last ``read``; empty where the
            bridge's blocks can't be skipped.
    """

    def __init__(self, bridge: Any) -> None:
        self.bridge = bridge
        self.blocks = list(bridge.blocks)
        self.residuals: list[torch.Tensor] = []
        self._length = 0

    def read(
        self, tokens: Int[torch.Tensor, "document pos"]
    ) -> Float[torch.Tensor, "document pos vocab"]:
        """Logits of a whole run; keeps what each block read, if a run from the last one agrees."""
        found: list[torch.Tensor] = []

        def before(module: Any, args: Any, kwargs: Any) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])

        def after(module: Any, args: Any, output: Any) -> None:
            self._length = len(output) if isinstance(output, tuple) else 0

        handles = [b.register_forward_pre_hook(before, with_kwargs=True) for b in self.blocks]
        handles.append(self.blocks[0].register_forward_hook(after))
        try:
            logits: torch.Tensor = self.bridge(tokens, return_type="logits")
        finally:
            for handle in handles:
                handle.remove()
        self.residuals = found if len(found) == len(self.blocks) else []
        if self.residuals and not self._agrees(tokens, logits):
            self.residuals = []
        return logits

    def _agrees(self, tokens: torch.Tensor, logits: torch.Tensor) -> bool:
        last = len(self.blocks) - 1
        try:
            with self.skipped(last, 1):
                again = self.bridge(tokens, return_type="logits")
        except Exception:  # a family whose model needs more of its blocks; all of them then run
            return False
        return float((again - logits).abs().max()) <= SAME * float(logits.abs().max())

    @contextmanager
    def skipped(self, layer: int, copies: int) -> Iterator[None]:
        """Blocks before ``layer`` give what it reads, for ``copies`` of the prompt in a batch."""
        residual = self.residuals[layer].repeat(copies, 1, 1)
        given = (residual, *[None] * (self._length - 1)) if self._length else residual
        # Past the block's own __setattr__, which would hand it on to the module that it wraps.
        spaces = [block.__dict__ for block in self.blocks[:layer]]
        own = [space.get("forward") for space in spaces]
        for space in spaces:
            space["forward"] = lambda *args, **kwargs: given
        try:
            yield
        finally:
            for space, forward in zip(spaces, own, strict=True):
                del space["forward"]
                if forward is not None:
                    space["forward"] = forward
