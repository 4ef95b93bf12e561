"""Settings that must match for a sweep to resume: model, text, seeds, points, cuts."""

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
    """The settings as plain values; an error message names the first that differs.

    Args:
        model: the model of the sweep.
        gains: the gains used to choose the cuts.
        text: fingerprint of the validation text.
        todo: points and their cuts, in order.
        sizes: number of documents in each batch.
        rule: rule for stopping points early.
        fused: whether losses are computed with fused attention.
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
    """Hexadecimal SHA-256 of every parameter, its type and the rotary base.

    ``model_fingerprint`` covers only the attention weights, which determine gains and masks. Losses
    also depend on all other parameters: biases, norms and MLPs.
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
