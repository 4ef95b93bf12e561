"""What half of the keys is worth in gainlens' own engine: counted, predicted and measured.

Writes ``docs/results/slim_ledger.json``. ``--size-check`` instead makes a random Llama of
TinyLlama's sizes slim in a process of its own and records time and peak memory in
``docs/results/slim_ledger_size_check.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

import gainlens as gl
from gainlens.ablation import KeyMask
from gainlens.export import SlicePlan, slim
from gainlens.export.speed_ledger import CONTEXTS, ledger
from gainlens.files import write_json
from gainlens.model.loading import load_hf

RESULTS = Path(__file__).resolve().parent.parent / "docs/results"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="sotu")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--values", type=float, default=None)
    parser.add_argument("--contexts", type=int, nargs="*", default=[*CONTEXTS[:2], 8192, 16384])
    parser.add_argument("--decode-tokens", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--size-check", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


def main() -> int:
    """Measure and write the result."""
    args = arguments()
    if args.size_check:
        return size_check(args.out or RESULTS / "slim_ledger_size_check.json")
    bridge = gl.load_model(args.model)
    tokens = gl.load_tokens(args.text, bridge, n_docs=8, length=256, split="calibration")
    gains = gl.probe_gains(bridge, tokens, progress=False)
    plan = SlicePlan.from_cut(KeyMask.quietest(gains, 1 - args.keep), values=args.values)
    baseline = load_hf(args.model)
    thin = slim(baseline, plan, tokens)
    full = slim(baseline, SlicePlan.identity(baseline))
    parity = {
        "largest_logit_difference": thin.gainlens_parity.difference,
        "identity_largest_logit_difference": full.gainlens_parity.difference,
        "largest_logit": float(thin.gainlens_parity.logits.abs().max()),
        "rounding": rounding(args.model, baseline, tokens, gains),
    }
    del bridge
    found = ledger(
        full,
        thin,
        baseline=baseline,
        contexts=args.contexts,
        decode_tokens=args.decode_tokens,
        repeats=args.repeats,
    )
    found.update(name=args.model, text=args.text, seed=0, parity=parity)
    write_json(args.out or RESULTS / "slim_ledger.json", found)
    for row in found["contexts"]:
        print(json.dumps(row))
    print(found["twice_as_fast"]["verdict"])
    return 0


def rounding(name: str, model: Any, tokens: torch.Tensor, gains: Any) -> list[dict[str, Any]]:
    """Largest logit differences, and how much of them is float32: the same in float64.

    The masked original and its slim model round differently, as do any two attentions. In float64
    nothing of a real difference would go away.
    """
    wide = load_hf(name, dtype=torch.float64)
    plans = {
        "identity": SlicePlan.identity(model),
        "half the keys": SlicePlan.from_cut(KeyMask.quietest(gains, 0.5)),
        "half the keys and values": SlicePlan.from_cut(KeyMask.quietest(gains, 0.5), values=0.5),
        "the same, one shared set": SlicePlan.from_cut(
            KeyMask.quietest(gains, 0.5, scope="universal"), values=0.5
        ),
    }
    rows: list[dict[str, Any]] = []
    for label, plan in plans.items():
        thin, exact = slim(model, plan, tokens), slim(wide, plan, tokens)
        text = thin.gainlens_parity.tokens
        with torch.no_grad():
            found, truth = thin(text).logits.double(), exact(text).logits
        row = {
            "plan": label,
            "slim to masked, float32": thin.gainlens_parity.difference,
            "slim to masked, float64": exact.gainlens_parity.difference,
            "slim float32 to float64": float((found - truth).abs().max()),
        }
        if label == "identity":
            for attention in ("sdpa", "eager"):
                model.set_attn_implementation(attention)
                with torch.no_grad():
                    own = model(text).logits.double()
                row[f"original with {attention}, float32 to float64"] = float(
                    (own - truth).abs().max()
                )
            model.set_attn_implementation("sdpa")
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def size_check(out: Path) -> int:
    """22 layers, 32 heads, 4 key heads of 64, random weights: under 30 s, 2.2 times the weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, head_dim=64, max_position_embeddings=2048,
    )  # fmt: skip
    idle = _resident()
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
        for module in model.modules():
            if hasattr(module, "inv_freq"):  # a buffer that to_empty left without numbers
                module.inv_freq, _ = module.compute_default_rope_parameters(config)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    keep = torch.zeros(22, 4, 64, dtype=torch.bool)
    keep[..., :16] = keep[..., 32:48] = True
    start = time.perf_counter()
    thin = slim(model, SlicePlan(keep))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - idle
    result = {
        "what": "gl.slim of a random Llama with TinyLlama's sizes, float32",
        "parameters": sum(p.numel() for p in model.parameters()),
        "slim_parameters": sum(p.numel() for p in thin.parameters()),
        "seconds": seconds,
        "seconds_target": 30,
        "peak_bytes_over_weights": peak / weights,
        "peak_target": 2.2,
        "largest_logit_difference": thin.gainlens_parity.difference,
        "seed": 0,
        "machine": machine(),
    }
    write_json(out, result)
    print(json.dumps(result, indent=1))
    return 0 if seconds <= 30 and peak <= 2.2 * weights else 1


def _resident() -> int:
    """Bytes in memory before there is a model: the libraries'."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    sys.exit(main())
