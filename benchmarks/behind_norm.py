"""What half of the keys cost where a norm acts on them, in the model that is written.

    python benchmarks/behind_norm.py [--model gemma3-270m] [--judge 24] [--out FILE]

The cut is that of ``gainlens.best_cut`` at 50% per layer (ranked by ``fisher``, fitted without
training), with the settings of the fit below, on calibration speeches and source files. It goes
through ``gainlens.slim`` and ``export_model``, and the folder is read back: that model is judged
against the intact one, on validation documents that chose nothing, by text; nothing was learned
from the documentation. Its logits are compared with those of the hooked original, on a document
past every window. The peak memory of the ``fisher`` probe is measured in a process of its own.

Gains, cut and losses stay in ``--cache``; a run that is killed goes on from there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from healing_text import SEEN
from slots import UNSEEN, apart, described, plain, texts_of

import gainlens as gl
from gainlens.ablation.fitting import RIDGES
from gainlens.ablation.recipe import RANKING_DOCUMENTS, RANKING_LENGTH, ranking_gains
from gainlens.data.document_identity import text_fingerprint
from gainlens.data.overlap import document_identities
from gainlens.data.texts import Texts
from gainlens.environment import environment
from gainlens.export.after_norm import map_weights
from gainlens.export.judging import token_losses
from gainlens.export.speed_ledger import sizes
from gainlens.files import read_json, write_json
from gainlens.model.loading import load_hf
from gainlens.model.zoo.cache import cache_root
from gainlens.stats.loss_rise import rise_verdicts
from gainlens.stats.verdicts import MARGIN

FRACTION, TARGET = 0.5, 0.05
LONG = 640
"""Positions on which slim model and hooked original are compared: more than Gemma's windows."""


def main() -> None:
    """Cut, write, read back, judge, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gemma3-270m", help="a name or a folder")
    parser.add_argument("--name", help="of the model in the record (default: --model)")
    parser.add_argument("--calibration", type=int, default=128, help="documents, of both texts")
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 256], help="of those")
    parser.add_argument("--windows", type=int, default=1, help="rows of each document")
    parser.add_argument("--rounds", type=int, default=6, help="of the fit, at most")
    parser.add_argument(
        "--stride", type=int, default=8, help="every how many queries one is fitted"
    )
    parser.add_argument("--ridge", type=float, nargs="*", default=RIDGES, help="to choose from")
    parser.add_argument(
        "--judge", type=int, default=24, help="documents of 256 tokens of each text"
    )
    parser.add_argument("--zeroed", action="store_true", help="judge the mask without a fit too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probe-memory", action="store_true", help="only that, in this process")
    parser.add_argument("--cache", type=Path, default=cache_root() / "behind_norm")
    parser.add_argument("--out", default="docs/results/behind_norm.json")
    args = parser.parse_args()
    if args.probe_memory:
        print(json.dumps(probe_memory(args)))
        return
    started = time.time()
    args.cache.mkdir(parents=True, exist_ok=True)

    def said(text: object) -> None:
        print(f"{time.time() - started:6.0f} s  {text}", flush=True)

    bridge = gl.load_model(args.model)
    calibration = gl.load_tokens(
        SEEN, bridge, n_docs=args.calibration, length=args.lengths, windows=args.windows
    )
    cut, seconds = cut_of(args, bridge, calibration)
    said(f"{cut!r} in {seconds:.0f} s")
    short = judges(args, bridge, calibration)
    folder = args.cache / f"slim_{cut.digest()[:12]}"
    thin = gl.slim(bridge, cut)
    parity = thin.gainlens_parity.difference
    if not folder.exists():
        gl.export_model(thin, folder)
    del thin
    thin = gl.load_slim(folder)
    long = gl.load_tokens("sotu", bridge, n_docs=1, length=LONG, split="validation")
    with torch.no_grad():
        got = thin(long, use_cache=False).logits
        with gl.ablate(bridge, cut):
            wanted = bridge(long, return_type="logits")
    past = float((got - wanted).abs().max())
    said(f"parity {parity:.1e}, of {LONG} tokens {past:.1e} of {float(wanted.abs().max()):.3g}")
    largest = float(wanted.abs().max())
    del bridge, got, wanted
    model = load_hf(args.model)
    intact = losses_of(args, model, short, "intact", said)
    full = sizes(gl.slim(model, gl.SlicePlan.identity(model)))
    del model
    fitted = losses_of(args, thin, short, f"slim_{cut.digest()[:12]}", said)
    after = sizes(thin)
    memory = kept_json(args.cache / "memory.json", lambda: measured(args))
    said(memory)
    record = {
        "what": "rise of the validation loss in nats per token, paired by document, of the slim "
        "model as it was written and read back",
        "model": args.name or args.model,
        "scope": "layer",
        "fraction": FRACTION,
        "kind": cut.kind,
        "fit": {**plain(cut.facts), "seconds": seconds},
        "text": {"calibration": described(calibration), "short": described(short)},
        "seed": args.seed,
        "target": TARGET,
        "fitted": judged(fitted - intact, short),
        "zeroed": None,
        "parity": {"slim": parity, f"past_windows_{LONG}": past, "largest_logit": largest},
        "cache_bytes_per_token": {
            "keys": [full.key_bytes, after.key_bytes],
            "values": [full.value_bytes, after.value_bytes],
        },
        "weights": {
            "full": full.parameters,
            "slim": after.parameters,
            "maps": map_weights(thin),
        },
        "fisher_probe": memory,
        **environment(),
    }
    write_json(args.out, record)
    said(summary(record["fitted"]))
    if args.zeroed:
        del thin
        masked = gl.slim(load_hf(args.model), cut.mask)
        zeroed = losses_of(args, masked, short, f"masked_{cut.mask.digest()[:12]}", said)
        record["zeroed"] = judged(zeroed - intact, short)
        write_json(args.out, record)
        said(summary(record["zeroed"]))


def cut_of(args, model, calibration):
    """The cut, from the cache or made, and how long it took to make."""
    text = f"{args.calibration}x{args.windows}x{'-'.join(map(str, args.lengths))}"
    ridges = "-".join(f"{r:g}" for r in args.ridge)
    gains_file = args.cache / f"gains_{text}.safetensors"
    file = args.cache / f"cut_{text}_{args.rounds}_{args.stride}_{ridges}.safetensors"
    if file.exists():
        return gl.load_cut(file), float(file.with_suffix(".seconds").read_text())
    if not gains_file.exists():
        ranking_gains(model, calibration).save(gains_file)
    gains = gl.KeyGains.load(gains_file)
    begun = time.time()
    mask = gl.KeyMask.quietest(gains, FRACTION, "fisher", "layer")
    cut = gl.refit(
        model, calibration, mask, rounds=args.rounds, stride=args.stride, ridge=args.ridge
    )
    took = time.time() - begun
    file.with_suffix(".seconds").write_text(str(took))
    cut.save(file)
    return cut, took


def judges(args, model, calibration) -> Texts:
    """Validation documents of three texts that share none with the calibration text."""
    parts = []
    for name in f"{SEEN},{UNSEEN}".split(","):
        every = gl.load_tokens(name, model, n_docs="all", length=256, split="validation")
        parts.append((name, list(every[: args.judge])))
    text = texts_of(parts)
    used = document_identities(list(calibration), model.tokenizer)
    return text.chosen(apart(text, used, model.tokenizer))


def losses_of(args, model, text: Texts, name: str, said) -> np.ndarray:
    """Mean loss of each document; what is done is kept."""
    file = args.cache / f"losses_{name}_{text_fingerprint(list(text))[:12]}.json"
    found = read_json(file)["losses"] if file.exists() else []
    for number in range(len(found), len(text)):
        row = token_losses(model, text[number][None]).double()
        found.append(float(row.mean()))
        if number % 8 == 7 or number == len(text) - 1:
            write_json(file, {"losses": found})
            said(f"{name}: {number + 1} of {len(text)} documents")
    return np.array(found)


def judged(rise: np.ndarray, text: Texts) -> dict:
    """Verdicts by text against the margin, and against the target."""
    rows = {}
    for key, margin in (("verdicts", MARGIN), ("at_target", TARGET)):
        found = rise_verdicts(
            rise, FRACTION, margin, trained=False, domains=text.domains, lengths=text.lengths
        )
        rows[key] = {name: verdict.to_json() for name, verdict in found.items()}
    return {**rows, "rises": [round(float(r), 6) for r in rise]}


def summary(row: dict) -> dict:
    """Rises by text, to watch."""
    return {name: round(verdict["estimate"], 4) for name, verdict in row["verdicts"].items()}


def kept_json(file: Path, make) -> dict:
    """What ``make`` returns, made once."""
    if not file.exists():
        write_json(file, make())
    return dict(read_json(file))


def measured(args) -> dict:
    """``probe_memory`` in a process of its own."""
    words = [sys.executable, __file__, "--model", args.model, "--probe-memory"]
    words += ["--calibration", str(args.calibration), "--windows", str(args.windows)]
    words += ["--lengths", *map(str, args.lengths)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def probe_memory(args) -> dict:
    """Gigabytes that the ranking of ``best_cut`` takes beyond the loaded model."""
    model = gl.load_model(args.model)
    tokens = gl.load_tokens(
        SEEN, model, n_docs=args.calibration, length=args.lengths, windows=args.windows
    )
    weights = sum(
        p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values()
    )
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize()
    ranking_gains(model, tokens, progress=False)
    # Not ru_maxrss, which starts at what the process that started this one held.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    return {
        "weights_gb": weights / 1e9,
        "loaded_gb": before / 1e9,
        "peak_gb": peak / 1e9,
        "beyond_loaded_gb": (peak - before) / 1e9,
        "beyond_weights_gb": (peak - weights) / 1e9,
        "documents": min(RANKING_DOCUMENTS, len(tokens)),
        "length": RANKING_LENGTH,
        "vocabulary": int(model.cfg.d_vocab),
    }


if __name__ == "__main__":
    main()
