"""Other untrained ways to smaller keys, on the text that judges ``benchmarks/slots.py``.

    python benchmarks/rivals.py [--fraction 0.5 0.75]

At equal bytes of keys per token: the ThinK rule (per head, by the norms of queries and keys), pairs
by ``fisher`` per layer without a fit (as RAP prunes pairs), random pairs, and a low rank per head:
keys are projected onto their first principal directions on the calibration text before the rotation
and expanded when they are read. The last keeps as many bytes but has to expand and rotate all keys
at every step, which these figures leave out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from healing_text import LENGTHS, SEEN
from slots import (
    BUCKETS,
    apart,
    described,
    judges,
    summary,
)

import gainlens as gl
from gainlens.analysis.damage_by_position import position_rise
from gainlens.data.document_identity import text_fingerprint
from gainlens.data.overlap import document_identities
from gainlens.data.texts import Texts
from gainlens.environment import environment
from gainlens.files import read_json, write_json
from gainlens.model.loading import load_hf
from gainlens.model.zoo.cache import cache_root
from gainlens.stats.loss_rise import rise_verdicts
from gainlens.stats.verdicts import MARGIN
from gainlens.training.student import Student

MASKS: dict[str, Callable[[gl.KeyGains, float, int], gl.KeyMask]] = {
    "ThinK rule, per head": lambda gains, cut, _: gl.KeyMask.quietest(gains, cut, "qk"),
    "fisher, per layer": lambda gains, cut, _: gl.KeyMask.quietest(gains, cut, "fisher", "layer"),
    "random pairs, per head": lambda gains, cut, seed: gl.KeyMask.random(gains, cut, seed),
}
LOW_RANK = "low rank per head"
Losses = tuple[np.ndarray, dict[str, list[torch.Tensor]]]


def main() -> None:
    """Cut, judge, write; rows that are done stay in ``--cache``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--fraction", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--calibration", type=int, default=64, help="documents, of both texts")
    parser.add_argument("--judge", type=int, default=100, help="short documents of each text")
    parser.add_argument("--long", type=int, default=8, help="documents of 2,048 tokens of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=cache_root() / "rivals")
    parser.add_argument("--out", type=Path, default=Path("docs/results/rivals.json"))
    args = parser.parse_args()
    begun = time.time()
    args.cache.mkdir(parents=True, exist_ok=True)
    bridge = gl.load_model(args.model)
    calibration = gl.load_tokens(SEEN, bridge, n_docs=args.calibration, length=LENGTHS)
    short, long = judges(args, bridge)
    used = document_identities(calibration, bridge.tokenizer)
    short, long = (t.chosen(apart(t, used, bridge.tokenizer)) for t in (short, long))
    judge = text_fingerprint([*short, *long])[:12]
    asked = f"{args.calibration}_{judge}_{args.seed}"
    some = [row[:512] for row in calibration[:: max(1, len(calibration) // 12)]]
    intact = load_hf(args.model)

    # Once, and only if a row is not kept yet.
    @cache
    def gains() -> gl.KeyGains:
        return gl.probe_gains(bridge, some, scores=("qk", "fisher"), tokens_per_batch=512)

    @cache
    def keys() -> list[torch.Tensor]:
        return second_moments(intact, calibration)

    @cache
    def before() -> Losses:
        return losses_of(Student(intact, gl.SlicePlan.identity(intact)), short, long)

    rows: dict[str, dict[str, Any]] = {}
    for fraction in args.fraction:
        for name in (*MASKS, LOW_RANK):
            kept = args.cache / f"{name}_{fraction}_{asked}.json".replace(" ", "-")
            if not kept.exists():
                if name in MASKS:
                    mask = MASKS[name](gains(), fraction, args.seed)
                    student = Student(intact, gl.SlicePlan.from_cut(mask))
                else:
                    thin = load_hf(args.model)
                    project(thin, keys(), fraction)
                    student = Student(thin, gl.SlicePlan.identity(thin))
                after = losses_of(student, short, long)
                write_json(kept, judged(before(), after, short, long, fraction))
            rows[f"{name}, {fraction:g}"] = read_json(kept)
            shown = summary(read_json(kept))
            print(f"{time.time() - begun:5.0f} s  {name:28s} {shown}", flush=True)
    write_json(
        args.out,
        {
            "what": "rise of the validation loss in nats per token, paired by document, untrained",
            "model": args.model,
            "text": {
                "calibration": described(calibration),
                "short": described(short),
                "long": described(long),
            },
            "rows": rows,
            "seed": args.seed,
            **environment(),
        },
    )


def losses_of(student: Student, short: Texts, long: Texts) -> Losses:
    """Mean loss of each short document, and next-token losses of the long ones by text."""
    return (
        np.concatenate([student.losses(batch) for batch in student.batches(short)]),
        {name: [student.token_losses(row[None]) for row in long.of(name)] for name in long.names},
    )


def judged(before: Losses, after: Losses, short: Texts, long: Texts, fraction: float) -> dict:
    """As in ``benchmarks/slots.py``."""
    verdicts = rise_verdicts(
        after[0] - before[0],
        fraction,
        MARGIN,
        trained=False,
        domains=short.domains,
        lengths=short.lengths,
    )
    by_position = {}
    for name in long.names:
        text = list(long.of(name))
        found = position_rise(
            [row[None] for row in text],
            {"cut": (fraction, in_order(after[1][name]))},
            in_order(before[1][name]),
            buckets=BUCKETS,
            text=text_fingerprint(text),
            progress=False,
        )
        by_position[name] = {"rows": found.table()}
    return {
        "verdicts": {name: verdict.to_json() for name, verdict in verdicts.items()},
        "by_position": by_position,
    }


def in_order(losses: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Losses that are known already, as a function of the batch that is asked for next."""
    known = iter(losses)
    return lambda _batch: next(known)


@torch.inference_mode()
def second_moments(model: Any, text: Texts) -> list[torch.Tensor]:
    """E[k kᵀ] of the projected keys, float64 ``[kv_head, d_head, d_head]`` per layer."""
    config = model.config
    d_head = config.head_dim or config.hidden_size // config.num_attention_heads
    sums = [torch.zeros(1)] * config.num_hidden_layers

    def record(number: int, _module: Any, _given: Any, out: torch.Tensor) -> None:
        k = out.reshape(-1, config.num_key_value_heads, d_head).double()
        sums[number] = sums[number] + torch.einsum("thi,thj->hij", k, k)

    hooks = [
        layer.self_attn.k_proj.register_forward_hook(partial(record, number))
        for number, layer in enumerate(model.model.layers)
    ]
    for row in text:
        model.model(input_ids=row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return sums


@torch.no_grad()
def project(model: Any, moments: list[torch.Tensor], fraction: float) -> None:
    """Project every head's keys, before the rotation, onto their first principal directions."""
    for layer, moment in zip(model.model.layers, moments, strict=True):
        d_head = moment.shape[-1]
        kept = d_head - 2 * round(fraction * d_head / 2)
        top = torch.linalg.eigh(moment).eigenvectors[..., -kept:]
        weight = layer.self_attn.k_proj.weight
        heads = weight.reshape(len(moment), d_head, -1).double()
        weight.copy_((top @ (top.mT @ heads)).reshape(weight.shape))


if __name__ == "__main__":
    main()
