"""Every family made slim: parity with the masked original, generation, and what is saved.

    python benchmarks/slim_families.py

Small random models of the families' own classes in transformers. Of each head a quarter to less
than a half of its rotary pairs (or dimensions) stays, chosen at random. The original is masked
inside transformers, by a key cache that zeroes what is cut. Both then generate from two rows, one
padded on the left, past every window.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from gainlens.environment import environment
from gainlens.export import SlicePlan, slim
from gainlens.export.modeling import family_of
from gainlens.export.speed_ledger import sizes
from gainlens.files import write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "export"))
NEW = 10
"""Tokens that are generated."""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="docs/results/slim_families.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    from slim_families import CONFIGS

    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 96, (2, 14), generator=generator)
    rows = []
    for name in CONFIGS:
        rows.append(measure(name, tokens))
        print(rows[-1], flush=True)
    write_json(
        args.out,
        {
            "what": "slim models against their originals with the same keys masked",
            "model": "small random models of each family's own class, float32",
            "text": f"random tokens {list(tokens.shape)}, then {NEW} generated ones",
            "seed": 5,
            "rows": rows,
            **environment(),
        },
    )


def measure(name: str, tokens: torch.Tensor) -> dict:
    """One configuration."""
    from slim_families import CONFIGS, MaskedCache, random_keep, random_model, shape_of

    hf = random_model(name)
    keep = random_keep(shape_of(hf), CONFIGS[name][1], ragged=False)
    whole = slim(hf, SlicePlan.identity(hf))
    thin = slim(hf, SlicePlan(keep))
    attention_mask = torch.ones_like(tokens)
    attention_mask[0, :4] = 0
    settings = {
        "do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0,
        "use_cache": True, "output_logits": True, "return_dict_in_generate": True,
        "attention_mask": attention_mask,
    }  # fmt: skip
    with torch.no_grad():
        uncut = hf(tokens, use_cache=False).logits
        same = whole(tokens, use_cache=False).logits
        masked = hf(tokens, use_cache=True, past_key_values=MaskedCache(keep, hf.config)).logits
        got = thin(tokens, use_cache=False).logits
        wanted = hf.generate(tokens, past_key_values=MaskedCache(keep, hf.config), **settings)
        written = thin.generate(tokens, **settings)
    before, after = sizes(whole), sizes(thin)
    pairs = zip(written.logits, wanted.logits, strict=True)
    return {
        "name": name,
        "model": type(hf).__name__,
        "saves": family_of(thin.config).saves(thin.config),
        "keys_kept": float(keep.float().mean()),
        "largest_logit": float(masked.abs().max()),
        "moved_by_the_cut": float((masked - uncut).abs().max()),
        "difference": float((got - masked).abs().max()),
        "difference_uncut": float((same - uncut).abs().max()),
        "difference_generating": max(float((a - b).abs().max()) for a, b in pairs),
        "tokens_equal": torch.equal(written.sequences, wanted.sequences),
        "parameters": [sum(p.numel() for p in hf.parameters()), after.parameters],
        "key_bytes": [before.key_bytes, after.key_bytes],
        "value_bytes": [before.value_bytes, after.value_bytes],
    }


if __name__ == "__main__":
    main()
