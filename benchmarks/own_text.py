"""Text that a model writes itself, to heal a cut of it on: no document of anybody is needed.

    python benchmarks/own_text.py --out FILE [--documents 320] [--length 512]

The first token of each document is drawn evenly from the vocabulary, so that the subjects vary; the
others are sampled from the model, at temperature 1. Batches that are done stay in ``FILE``.
(Liu et al. 2023, LLM-QAT, arXiv:2305.17888, heal a quantised model so.)
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from gainlens.data.texts import Texts
from gainlens.files import load_tensors, save_tensors
from gainlens.model.loading import load_hf, load_tokenizer

KIND = "own text"
NAME = "own"
"""The name of this text among a training text's domains."""


def main() -> None:
    """Sample batch after batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--documents", type=int, default=320)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    begun = time.time()
    model = load_hf(args.model).bfloat16().eval()
    special = set(load_tokenizer(args.model).all_special_ids)
    done = load_tensors(args.out, KIND)[0] if args.out.exists() else {}
    for start in range(0, args.documents, args.batch):
        if f"{start:06d}" in done:
            continue
        torch.manual_seed(args.seed + start)
        rows = min(args.batch, args.documents - start)
        done[f"{start:06d}"] = sampled(model, rows, args.length, special)
        save_tensors(args.out, KIND, done, {"model": args.model, "seed": args.seed})
        print(f"{time.time() - begun:5.0f} s  {start + rows} documents", flush=True)


@torch.inference_mode()
def sampled(model, rows: int, length: int, special: set[int]) -> torch.Tensor:
    """Token ids ``[row, pos]``; no special token, since documents of other texts have none."""
    shut = torch.tensor(sorted(special))
    first = torch.ones(model.config.vocab_size)
    first[shut] = 0
    tokens = torch.multinomial(first, rows, replacement=True)[:, None]
    found = [tokens]
    past = None
    while len(found) < length:
        step = model(input_ids=found[-1], past_key_values=past, use_cache=True)
        past = step.past_key_values
        logits = step.logits[:, -1].float()
        logits[:, shut] = -torch.inf
        found.append(torch.multinomial(logits.softmax(-1), 1))
    return torch.cat(found, 1)


def own_text(file: Path) -> Texts:
    """What ``main`` wrote."""
    tensors, _ = load_tensors(file, KIND)
    rows = tuple(row for _, batch in sorted(tensors.items()) for row in batch)
    return Texts(rows, (NAME,) * len(rows), tuple(range(len(rows))))


if __name__ == "__main__":
    main()
