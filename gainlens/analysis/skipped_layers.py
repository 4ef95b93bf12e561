"""Run a bridge from a given block on: earlier blocks pass the residual through without computing.

transformer-lens 3.9 cannot start a bridge at a layer, and version 4 still runs the earlier layers
and discards their output. Here their ``forward`` is replaced during one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int

SAME = 1e-4
"""Largest difference between logits, relative to the largest logit, for runs to count as equal."""


class Prefix:
    """The input of each block of a bridge in a run of one prompt.

    Args:
        bridge: a TransformerBridge; its hooks run as usual in the blocks that are computed.

    Attributes:
        residuals: ``[document, pos, d_model]`` per block, from the last ``read``; empty if
            the blocks of the bridge cannot be skipped.
    """

    def __init__(self, bridge: Any) -> None:
        self.bridge = bridge
        self.blocks = list(bridge.blocks)
        self.residuals: list[torch.Tensor] = []
        self._length = 0

    def read(
        self, tokens: Int[torch.Tensor, "document pos"]
    ) -> Float[torch.Tensor, "document pos vocab"]:
        """Logits of a full run; stores block inputs if a run from the last block agrees with it."""
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
        except Exception:  # a family that needs more from its blocks; then all of them run
            return False
        return float((again - logits).abs().max()) <= SAME * float(logits.abs().max())

    @contextmanager
    def skipped(self, layer: int, copies: int) -> Iterator[None]:
        """Blocks before ``layer`` return its stored input, for ``copies`` of the prompt."""
        residual = self.residuals[layer].repeat(copies, 1, 1)
        given = (residual, *[None] * (self._length - 1)) if self._length else residual
        # Bypass the block's own __setattr__, which would pass it on to the wrapped module.
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
