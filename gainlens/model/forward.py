"""Forward passes that keep no more than they need."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from jaxtyping import Float, Int


def forward_layers(model: Any, tokens: Int[torch.Tensor, "document pos"]) -> None:
    """Run every layer for the sake of its hooks; logits are dropped, no gradient is kept."""
    with torch.inference_mode():
        model(tokens.to(next(model.parameters()).device), return_type=None)


def token_losses(
    model: Any, tokens: Int[torch.Tensor, "document pos"]
) -> Float[torch.Tensor, "document next_pos"]:
    """Next-token loss in nats per position, float32 on the CPU, ``[document, pos - 1]``."""
    tokens = tokens.to(next(model.parameters()).device)
    with torch.inference_mode():
        logits = model(tokens, return_type="logits")
        flat = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
    return flat.reshape(tokens.shape[0], -1).cpu()


class TextHasher:
    """Fingerprint of a text that does not depend on how it is cut into batches."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, batch: Int[torch.Tensor, "document pos"]) -> None:
        """Add documents in order."""
        for row in batch.to("cpu", torch.int64):
            self._hash.update(len(row).to_bytes(8, "little"))
            self._hash.update(row.numpy().astype("<i8").tobytes())

    def hexdigest(self) -> str:
        """SHA-256 of lengths and ids of all documents so far."""
        return self._hash.hexdigest()
