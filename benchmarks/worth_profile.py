"""gainlens' engine beside llama.cpp in float32, and where a decoding step of it spends its time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from worth_speed import LLAMA, Decoding, in_llama_cpp, merged

import gainlens as gl
from gainlens.export import export_model
from gainlens.export.timing import measure
from gainlens.model.zoo import smollm2

SHOWN = 8
"""Operations of the profile that are listed."""


def float32(
    checkpoint: str,
    folder: Path,
    filler: list[int],
    cells: list[tuple[int, int]],
    steps: int,
    turns: int,
    work: Path,
) -> dict[str, Any]:
    """Decoding speed of one checkpoint in both engines, all in float32, and a profile of ours.

    Args:
        checkpoint: its name.
        folder: a slim folder that llama.cpp can hold.
        filler: token ids of text.
        cells: contexts and batches.
        steps: decoding steps.
        turns: of llama.cpp; the median counts.
        work: folder for files.
    """
    model = gl.load_slim(folder)
    target = work / f"{folder.name}_llama.cpp_f32"
    if not target.is_dir():
        export_model(model, target, "llama.cpp", precision="f32", tokenizer=smollm2.packaged_gguf())
    rows = []
    for context, batch in cells:
        ours = measure([Decoding("ours", model)], context, batch, steps, 0)["ours"]
        row: dict[str, Any] = {
            "context": context,
            "batch": batch,
            "gainlens": ours["decode_tokens_per_second"],
        }
        if LLAMA.exists():
            files, caches = {checkpoint: target / "model.gguf"}, {checkpoint: ["f32"]}
            asked = (files, caches, filler, [context], [batch], steps, work)
            (found,) = merged([in_llama_cpp(*asked) for _ in range(turns)])
            row |= {"llama.cpp": found.get("tokens_per_second"), "not_run": found.get("not_run")}
        rows.append({**row, "profile": profile(model, context, batch)})
        print(row, flush=True)
    return {"checkpoint": checkpoint, "rows": rows}


@torch.inference_mode()
def profile(model: Any, context: int, batch: int, steps: int = 8) -> dict[str, Any]:
    """Milliseconds of a decoding step by operation, and what is outside of all operations."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    width = 512
    tokens = torch.randint(0, int(model.config.vocab_size), (batch, width))
    for start in range(0, context, width):
        part = tokens[:, : min(width, context - start)]
        model(part, past_key_values=cache, logits_to_keep=1)
    step = tokens[:, :1]
    for _ in range(2):
        model(step, past_key_values=cache, logits_to_keep=1)
    begun = time.perf_counter()
    for _ in range(steps):
        model(step, past_key_values=cache, logits_to_keep=1)
    plain = (time.perf_counter() - begun) / steps
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            model(step, past_key_values=cache, logits_to_keep=1)
    table = sorted(seen.key_averages(), key=lambda row: -row.self_cpu_time_total)
    found = {row.key: row.self_cpu_time_total / steps / 1e3 for row in table[:SHOWN]}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    held = sum(t.numel() * t.element_size() for la in cache.layers for t in (la.keys, la.values))
    return {
        "step_ms": 1e3 * plain,
        "operations_ms": found,
        "operations_in_a_step": sum(row.count for row in table) / steps,
        "weight_bytes": weights,
        "cache_bytes": held,
    }
