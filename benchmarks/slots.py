"""What a cut of SmolLM2's keys costs by domain and position: untrained, and healed.

    python benchmarks/slots.py --run universal-50 [--steps 200] [--out FILE | --save FOLDER]

The cut is ``gainlens.best_cut``: ranked by ``fisher``, fitted to the intact attention logits on
calibration speeches and source files of mixed lengths. With ``--steps`` it is then healed on
training speeches and source files of mixed lengths; with ``--own`` on text that the intact model
wrote as well (``own_text.py``), with ``--recall`` on text that repeats itself (``recall.py``).
``--texts wide`` chooses, fits and heals on C++ headers and packages' descriptions as well.
``--length 2048`` fits on documents of one length; the record says how much memory the fit took.
Validation documents that chose and trained nothing judge both: speeches, source files, and
documentation, from which nothing was learned; short documents of each, and long ones of the first
two by position.

Gains, cuts and checkpoints stay in ``--cache``; a run that is killed goes on from there.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from healing_text import LENGTHS, SEEN, TEXTS, beside, training_text
from memory import peak
from own_text import own_text
from recall import recall_text

import gainlens as gl
from gainlens.ablation.recipe import ranking_gains
from gainlens.analysis.damage_by_position import position_rise
from gainlens.analysis.map.universality import slot_moves
from gainlens.data.document_identity import tensor_digest, text_fingerprint
from gainlens.data.overlap import document_identities, shares_text
from gainlens.data.texts import Texts
from gainlens.environment import environment
from gainlens.files import load_tensors, read_json, save_tensors, write_json
from gainlens.model.loading import load_hf
from gainlens.model.zoo.cache import cache_root
from gainlens.stats.loss_rise import rise_verdicts
from gainlens.stats.verdicts import MARGIN
from gainlens.training import train_virtual_width
from gainlens.training.student import Student
from gainlens.training.virtual_width import VALUE_DOCUMENTS

RUNS = {  # scope, share of key dimensions that is cut, share of value dimensions that stays
    "layer-50": ("layer", 0.5, None),
    "universal-50": ("universal", 0.5, None),
    "layer-75": ("layer", 0.75, None),
    "universal-75": ("universal", 0.75, None),
    "universal-50-values": ("universal", 0.5, 0.5),
}
UNSEEN = "pydoc,docstrings"
BUCKETS = (0, 64, 256, 512, 1024)


def main() -> None:
    """Cut, judge, heal, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", choices=RUNS, default="universal-50")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", choices=TEXTS, default="two", help="to choose, fit and heal on")
    parser.add_argument("--calibration", type=int, default=64, help="documents, of all these texts")
    parser.add_argument("--length", type=int, help="of every calibration document; default: mixed")
    parser.add_argument("--rounds", type=int, default=6, help="of the fit, at most")
    parser.add_argument("--steps", type=int, default=0, help="of healing; 0: none")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--train", default="q,k,v,o")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--other-lr", type=float, default=3e-4)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--judge", type=int, default=100, help="short documents of each text")
    parser.add_argument("--long", type=int, default=8, help="documents of 2,048 tokens of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--frequencies", action="store_true", help="record the slots of the cut; judge nothing"
    )
    parser.add_argument("--own", type=Path, help="heal on this text of the model's own as well")
    parser.add_argument(
        "--recall", type=int, default=0, help="heal on this many documents of recall.py as well"
    )
    parser.add_argument("--save", type=Path, help="write the healed model as a slim folder as well")
    parser.add_argument("--cache", type=Path, default=cache_root() / "slots")
    parser.add_argument(
        "--out", default="", help="default: slots_RUN.json beside the other records"
    )
    args = parser.parse_args()
    scope, fraction, values = RUNS[args.run]
    started = time.time()
    args.cache.mkdir(parents=True, exist_ok=True)

    def said(text: object) -> None:
        print(f"{time.time() - started:6.0f} s  {text}", flush=True)

    bridge = gl.load_model(args.model)
    seen = TEXTS[args.texts]
    calibration = gl.load_tokens(
        seen, bridge, n_docs=args.calibration, length=args.length or LENGTHS
    )
    cut, took = cut_of(args, bridge, calibration, scope, fraction)
    said(f"{cut!r} in {took}")
    if args.frequencies:
        found = slots_of(args, cut) | {"text": described(calibration), **took}
        write_json(args.out or "docs/results/slots_frequencies.json", found)
        return
    short, long = judges(args, bridge)
    training = training_text(args.texts, bridge)
    if args.own:
        training = beside(training, own_text(args.own))
    if args.recall:
        training = beside(training, recall_text(training, args.recall, args.seed))
    tokenizer = bridge.tokenizer
    del bridge
    used = document_identities([*training, *calibration], tokenizer)
    kept = [apart(text, used, tokenizer) for text in (short, long)]
    short, long = (text.chosen(some) for text, some in zip((short, long), kept, strict=True))
    model = load_hf(args.model)
    model.tokenizer = tokenizer
    trains = tuple(args.train.split(","))
    plan = gl.SlicePlan.from_cut(cut, values=values)
    known = args.cache / f"{args.run}_{cut.digest()[:12]}_{text_fingerprint(list(short))[:12]}.json"
    if known.exists():
        untrained = read_json(known)
    else:
        student = Student(model, plan, trains, text=training[:VALUE_DOCUMENTS])
        untrained = judged(student, short, long, fraction, args.cache, trained=False)
        write_json(known, untrained)
        del student
    said(summary(untrained))
    healed = None
    if args.steps:
        run = train_virtual_width(
            model,
            plan,
            training,
            steps=args.steps,
            monitor=gl.load_tokens(
                seen, tokenizer, n_docs=args.calibration + 16, length=256
            )[args.calibration :],
            checkpoint=args.cache / checkpoint_name(args),
            batch=args.batch,
            train=trains,
            lr=args.lr,
            other_lr=args.other_lr,
            precision=args.precision,
            check_every=50,
            seed=args.seed,
        )  # fmt: skip
        if args.save:
            slim = gl.slim(run.model, run.plan, training[:VALUE_DOCUMENTS])
            shutil.rmtree(args.save, ignore_errors=True)
            gl.export_model(slim, args.save, tokenizer=tokenizer)
            said(f"{slim.num_parameters():,} weights in {args.save}")
            del slim
        for text in (short, long):
            run.check_apart(text)
        healed = judged(run.student, short, long, fraction, args.cache, trained=True)
        healed |= {
            "curve": [
                {**row, "loss": None if row["loss"] is None else round(row["loss"], 5)}
                for row in run.curve
            ],
            "facts": run.facts | {"refit": plain(run.facts.get("refit") or {})},
        }
        said(summary(healed))
    write_json(
        args.out or f"docs/results/slots_{args.run}.json",
        {
            "what": "rise of the validation loss in nats per token, paired by document",
            "run": args.run,
            "model": args.model,
            "scope": scope,
            "fraction": fraction,
            "values_kept": values,
            "kind": cut.kind,
            "fit": {**plain(cut.facts), **took},
            "text": {
                "calibration": described(calibration),
                "training": described(training) if args.steps else None,
                "short": described(short),
                "long": described(long),
            },
            "seed": args.seed,
            "untrained": untrained,
            "healed": healed,
            **environment(),
        },
    )


def checkpoint_name(args) -> str:
    """Of the run that heals."""
    frequencies = "_f" if "frequencies" in args.train else ""
    own = "_own" if args.own else ""
    recall = f"_r{args.recall}" if args.recall else ""
    length = f"-{args.length}" if args.length else ""
    name = f"{args.run}{wide(args)}{length}_{args.steps}x{args.batch}_{args.seed}"
    return f"{name}{own}{recall}{frequencies}.safetensors"


def wide(args) -> str:
    """What the names of files say about the texts."""
    return "" if args.texts == "two" else f"-{args.texts}"


def cut_of(args, model, calibration, scope: str, fraction: float):
    """The cut, from the cache or made, and what it took: seconds, and gigabytes at the peak."""
    gains_file = args.cache / f"gains{fitted_on(args)}.safetensors"
    name = args.run.removesuffix("-values")
    file = args.cache / f"{name}{fitted_on(args)}_{args.rounds}.safetensors"
    known = file.with_suffix(".json")
    if file.exists():
        if known.exists():
            return gl.load_cut(file), read_json(known)
        return gl.load_cut(file), {"seconds": float(file.with_suffix(".seconds").read_text())}
    begun = time.time()
    if gains_file.exists():
        gains = gl.KeyGains.load(gains_file)
        before = float(gains_file.with_suffix(".seconds").read_text())
    else:
        gains = ranking_gains(model, calibration)
        before = time.time() - begun
        gains_file.with_suffix(".seconds").write_text(str(before))
        gains.save(gains_file)
    begun = time.time()
    cut = gl.best_cut(model, calibration, fraction, scope, gains=gains, rounds=args.rounds)
    took = {"seconds": before + time.time() - begun, "peak_gb": peak()}
    write_json(known, took)
    cut.save(file)
    return cut, took


def fitted_on(args) -> str:
    """What the names of files say about the calibration text."""
    length = f"x{args.length}" if args.length else ""
    return f"{wide(args)}_{args.calibration}{length}"


def slots_of(args, cut) -> dict:
    """Where the slots of a universal cut lie, how loud the pairs there are, and what moves where.

    ``moves`` counts the heads that first give a pair (row) to a slot (column); ``importance`` is
    the mean share of a pair in its head's fisher gain, per layer.
    """
    gains = gl.KeyGains.load(args.cache / f"gains{fitted_on(args)}.safetensors")
    pairs = gains.score("fisher", unit="pair")[..., : cut.own.shape[1]].double()
    shares = (pairs / pairs.sum(-1, keepdim=True)).mean(1)
    return {
        "what": "slot frequencies of one universal set, radians per token",
        "run": args.run,
        "model": args.model,
        **slot_moves(cut),
        "importance": shares.tolist(),
        "fit": plain(cut.facts),
        "seed": args.seed,
        **environment(),
    }


def judges(args, model) -> tuple[Texts, Texts]:
    """Short documents of every text, and long ones of the two that were learned from."""
    parts = []
    for name in f"{SEEN},{UNSEEN}".split(","):
        every = gl.load_tokens(name, model, n_docs="all", length=256, split="validation")
        parts.append((name, list(every[: args.judge])))
    long = gl.load_tokens(SEEN, model, n_docs=2 * args.long, length=[2048], split="validation")
    return texts_of(parts), long


def apart(text: Texts, used, tokenizer) -> list[int]:
    """The documents that share no text with what chose or trained.

    What counts as a formula depends on the documents that are compared, so it is asked again.
    """
    rows = list(range(len(text)))
    while any(shared := shares_text(text.chosen(rows), used, tokenizer)):
        rows = [row for row, like in zip(rows, shared, strict=True) if not like]
    return rows


def texts_of(parts: list[tuple[str, list]]) -> Texts:
    """Rows of several texts, each a document of its own."""
    rows = [(row, name) for name, some in parts for row in some]
    return Texts(
        tuple(row for row, _ in rows), tuple(name for _, name in rows), tuple(range(len(rows)))
    )


class Intact:
    """The intact model's loss at each position, kept in a file: every run is compared with it.

    ``read`` gives the losses ``[document, next_pos]`` of a batch.
    """

    def __init__(self, read: Callable[[torch.Tensor], torch.Tensor], file: Path) -> None:
        self.read, self.file = read, file
        self.known = load_tensors(file, "losses")[0] if file.exists() else {}

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Losses of a batch, ``[document, next_pos]``."""
        key = tensor_digest([batch])
        if key not in self.known:
            self.known[key] = self.read(batch)
        return self.known[key]

    def save(self) -> None:
        """For the next run."""
        save_tensors(self.file, "losses", self.known, {})


def judged(
    student: Student, short: Texts, long: Texts, fraction: float, folder: Path, *, trained: bool
) -> dict:
    """Verdicts by text at 256 tokens, and the rise by position on long documents by text."""
    intact = Intact(
        partial(student.token_losses, intact=True),
        folder / f"intact_{student.fingerprint[:12]}.safetensors",
    )
    rise = np.concatenate(
        [
            (student.token_losses(batch).double() - intact(batch).double()).mean(1).numpy()
            for batch in student.batches(short)
        ]
    )
    intact.save()
    verdicts = rise_verdicts(
        rise, fraction, MARGIN, trained=trained, domains=short.domains, lengths=short.lengths
    )
    by_position = {}
    for name in long.names:
        text = long.of(name)
        found = position_rise(
            [row[None] for row in text],
            {args_name(trained): (fraction, student.token_losses)},
            intact,
            buckets=BUCKETS,
            text=text_fingerprint(list(text)),
            progress=False,
        )
        by_position[name] = found.to_json()
        intact.save()
    return {
        "verdicts": {name: verdict.to_json() for name, verdict in verdicts.items()},
        "rises": [round(float(r), 6) for r in rise],
        "by_position": by_position,
    }


def args_name(trained: bool) -> str:
    """Of the model that is judged."""
    return "healed" if trained else "untrained"


def summary(row: dict) -> str:
    """One line to watch."""
    short = {name: round(v["estimate"], 4) for name, v in row["verdicts"].items()}
    far = {
        name: [round(r["rise"], 3) for r in found["rows"]]
        for name, found in row["by_position"].items()
    }
    return f"{short} {far}"


def described(text) -> dict:
    """Names, sizes and fingerprint of a text."""
    return {
        "texts": list(text.names),
        "documents": len(set(text.groups)),
        "rows": len(text),
        "lengths": sorted(set(text.lengths)),
        "tokens": sum(text.lengths),
        "sha256": text_fingerprint(list(text)),
    }


def plain(facts: dict) -> dict:
    """Facts of a fit without the identities of its documents."""
    return {k: v for k, v in facts.items() if k not in ("fingerprint", "text", "documents")}


if __name__ == "__main__":
    main()
