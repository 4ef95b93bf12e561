"""What must be the same for a sweep to go on: model, text, seeds, points, cuts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from gainlens.ablation.cut import Cut
from gainlens.analysis.sweep.points import Point
from gainlens.probes.gains import KeyGains
from gainlens.stats.stopping import StoppingRule


def sweep_header(
    model: Any,
    gains: KeyGains,
    text: str,
    todo: Sequence[tuple[Point, Cut]],
    sizes: Sequence[int],
    rule: StoppingRule | None,
    fused: bool,
) -> dict[str, Any]:
    """Plain values; the first that differs is what a user is told.

    Args:
        model: whose losses are taken.
        gains: that chose the cuts.
        text: fingerprint of the validation text.
        todo: points and their cuts, in order.
        sizes: documents of each batch.
        rule: by which points stop early.
        fused: whether fused attention computes the losses.
    """
    return {
        "model": model_digest(model),
        "text": text,
        "seeds": sorted({p.seed for p, _ in todo if p.seed is not None}),
        "points": [asdict(p) for p, _ in todo],
        "cuts": hashlib.sha256("".join(cut.digest() for _, cut in todo).encode()).hexdigest(),
        "gains": list(gains.texts),
        "batches": list(sizes),
        "stopping": None if rule is None else asdict(rule),
        "attention": "fused" if fused else "hooks",
    }


@torch.no_grad()
def model_digest(model: Any) -> str:
    """SHA-256, in hexadecimal, of every parameter, its type and the rotary base.

    ``model_fingerprint`` reads the attention weights, which is what gains and masks belong to;
    losses hang on all others too, biases, norms and MLPs.
    """
    root = getattr(model, "original_model", model)
    config = getattr(root, "config", None)
    rotation = [
        getattr(config, "rope_parameters", None),
        getattr(config, "rope_theta", None),
        getattr(model.cfg, "rotary_base", None),
    ]
    digest = hashlib.sha256(json.dumps(rotation, sort_keys=True, default=str).encode())
    for name, parameter in root.named_parameters():
        plain = parameter.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {plain.dtype} {tuple(parameter.shape)}".encode())
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()
