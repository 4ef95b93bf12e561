"""Private memory of probing a model whose weights stay in their files.

    python benchmarks/mapped_weights.py [--layers 12] [--folder DIR]

Seven billion weights: ``--d-model 4096 --layers 32 --d-mlp 11008 --kv-heads 32``.

A random Llama is written as bfloat16 shards, one per layer, and loaded in the type that it is
stored in. Its weights are then pages of the files: the system reads them as they are used and may
drop them again, so they need not fit into memory. What has to fit is the private memory of the
process (``RssAnon`` of Linux), which is sampled while it loads, probes and ranks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import gainlens as gl
from gainlens.environment import environment
from gainlens.files import write_json

HEADS = 32
VOCABULARY = 32000


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, default=2048)
    parser.add_argument("--d-mlp", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--folder", help="where to keep the model; by default a temporary one")
    parser.add_argument("--out", default="docs/results/mapped_weights.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as beside:
        folder = Path(args.folder or beside)
        if not (folder / "config.json").is_file():
            write_model(folder, args)
        facts = measure(folder, args.documents, args.length)
    write_json(
        args.out,
        {
            "what": "private memory of a process that probes a model whose weights stay in files",
            "model": f"random Llama, {args.layers} layers of {args.d_model}, bfloat16",
            "documents": args.documents,
            "length": args.length,
            "seed": 0,
            **facts,
            **environment(),
        },
    )
    print(json.dumps(facts, indent=1))


def measure(folder: Path, documents: int, length: int) -> dict[str, Any]:
    """Peaks of private memory in megabytes, by stage, and the size of the weights."""
    memory = Memory()
    steps: list[dict[str, Any]] = []

    def done(stage: str) -> None:
        steps.append({"stage": stage, **memory.since()})
        print(steps[-1], flush=True)

    done("import")
    model = gl.load_model(folder, dtype=torch.bfloat16)
    done("load")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (documents, length), generator=generator)
    gains = gl.probe_gains(model, tokens, progress=False)
    done("probe")
    mask = gl.KeyMask.quietest(gains, 0.5, "qk")
    model.run_with_hooks(tokens, fwd_hooks=gl.ablation_hooks(model, mask))
    done("cut")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "weights_mb": round(weights / 2**20),
        "n_weights": sum(p.numel() for p in model.parameters()),
        "steps": steps,
    }


class Memory:
    """The largest private memory seen, sampled a hundred times a second."""

    def __init__(self) -> None:
        self._peak, self._last = 0, time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()

    def since(self) -> dict[str, float]:
        """Now, the peak, and the seconds since the last call."""
        now, seconds = private_mb(), time.monotonic() - self._last
        found = {"private_mb": now, "peak_mb": max(self._peak, now), "seconds": round(seconds, 1)}
        self._peak, self._last = 0, time.monotonic()
        return found

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, private_mb())
            time.sleep(0.01)


def private_mb() -> int:
    """Memory of this process that is not backed by a file, in megabytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) >> 10
    return 0


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """A random Llama as bfloat16 shards, one layer in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=args.d_model,
        intermediate_size=args.d_mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=args.kv_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    d, keys = args.d_model, args.kv_heads * (args.d_model // HEADS)
    ones = torch.ones(d, dtype=torch.bfloat16)
    places: dict[str, str] = {}
    for number in range(args.layers + 1):
        if number < args.layers:
            at = f"model.layers.{number}."
            shard = {
                f"{at}self_attn.q_proj.weight": random(d, d),
                f"{at}self_attn.k_proj.weight": random(keys, d),
                f"{at}self_attn.v_proj.weight": random(keys, d),
                f"{at}self_attn.o_proj.weight": random(d, d),
                f"{at}mlp.gate_proj.weight": random(args.d_mlp, d),
                f"{at}mlp.up_proj.weight": random(args.d_mlp, d),
                f"{at}mlp.down_proj.weight": random(d, args.d_mlp),
                f"{at}input_layernorm.weight": ones.clone(),
                f"{at}post_attention_layernorm.weight": ones.clone(),
            }
        else:
            shard = {
                "model.embed_tokens.weight": random(VOCABULARY, d),
                "lm_head.weight": random(VOCABULARY, d),
                "model.norm.weight": ones.clone(),
            }
        name = f"model-{number + 1:05d}-of-{args.layers + 1:05d}.safetensors"
        save_file(shard, str(folder / name), metadata={"format": "pt"})
        places |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


if __name__ == "__main__":
    main()
