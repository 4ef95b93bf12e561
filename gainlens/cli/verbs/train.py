"""``gainlens train``: heal a cut at virtual width, judge it, write the trained model."""

from __future__ import annotations

import argparse
import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gainlens.ablation import RefitCut, best_cut, load_cut
from gainlens.ablation.recipe import RANKING_DOCUMENTS
from gainlens.cli.verbs.common import add_text_arguments, open_model
from gainlens.errors import GainlensError, InputError
from gainlens.export import SlicePlan
from gainlens.export.recipe import refitted
from gainlens.export.sources import open_source
from gainlens.files import check_free, check_writable, read_json, write_json
from gainlens.model import load_tokens
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.loading import load_hf
from gainlens.plots.training_runs import plot_training
from gainlens.probes import KeyGains
from gainlens.training import TrainingRun, nested_plans, train_virtual_width
from gainlens.training.processes import Processes, gather_gains
from gainlens.training.run import rise_verdict, row_digests
from gainlens.training.settings import Settings
from gainlens.training.student import Student, check_plan

HELP = "heal a cut: train what a plan keeps, judge it, write the trained model"
OUT = "healed"
FIGURE = "loss.png"
WAY = "plan.{}.json"
"""Plans of the rounds before the last, in the folder of an unfinished run."""
SETTINGS = (
    "objective",
    "batch",
    "lr",
    "other_lr",
    "weight_decay",
    "attention",
    "precision",
    "check_every",
    "stop_margin",
)
"""Options that go to ``train_virtual_width`` as they are; their defaults too, but for these."""
DEFAULTS = {"lr": 6e-4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments besides the common ones."""
    add_text_arguments(parser, n_docs=24)
    parser.add_argument("--plan", help="a plan file, in the place of --keep and --scope")
    parser.add_argument("--keep", type=float, default=0.5, help="share of key dimensions that stay")
    parser.add_argument("--score", default="fisher", help="which gain ranks the units")
    parser.add_argument("--scope", default="layer", help="head, layer, model, universal")
    parser.add_argument(
        "--refit-rounds", type=int, default=2, help="least-squares refit to start from; 0: none"
    )
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps, of all rounds")
    parser.add_argument("--rounds", type=int, default=1, help="cut in so many, healing between")
    parser.add_argument("--train", default="q,k,v,o", help="q, k, v, o, mlp, norm, embedding")
    plain = Settings(steps=1)
    for name in SETTINGS:
        default = DEFAULTS.get(name, getattr(plain, name))
        kind = float if default is None else type(default)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, help=f"default {default}"
        )
    parser.add_argument(
        "--monitor", type=int, default=8, help="calibration documents on which the run is watched"
    )
    parser.add_argument("--judge", type=int, default=32, help="validation documents that judge")
    parser.add_argument("--margin", type=float, default=0.02, help="nats that count as no rise")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Cut, train, judge, write; after a kill, go on with what was done (``OUT.part``)."""
    out = Path(options.out)
    processes = Processes.here()
    _check(options, out)
    part = _open_part(options, out, processes)
    try:
        result = _heal(options, out, part, processes)
    except GainlensError:
        if processes.first and not any(part.glob("checkpoint*")):
            shutil.rmtree(part, ignore_errors=True)  # nothing to go on from: other options may come
        raise
    if not processes.first:  # which alone speaks
        options.json = False
        return {}
    return result


def _heal(
    options: argparse.Namespace, out: Path, part: Path, processes: Processes
) -> dict[str, Any]:
    bridge = open_model(options)
    texts = _texts(options, bridge)
    tokenizer = getattr(bridge, "tokenizer", None)
    _cut(options, bridge, texts["calibration"], part, processes)
    del bridge
    plan = SlicePlan.load(part / "plan.json")
    kept = part / "refit.safetensors"
    maps = load_cut(kept).maps if kept.exists() else None
    if maps is not None and options.rounds == 1:
        plan = replace(plan, maps=maps)
    model = load_hf(options.model, device=options.device)
    way = [*(SlicePlan.load(part / WAY.format(n)) for n in range(1, options.rounds)), plan]
    if maps is not None:
        way[0] = replace(way[0], maps=maps)
    before = _untrained(model, plan, texts, options)
    trained = train_virtual_width(
        model,
        way,
        texts["training"],
        steps=options.steps,
        monitor=texts["monitor"],
        checkpoint=part / "checkpoint.safetensors",
        save_every=options.save_every,
        **_settings(options),
    )
    verdict = trained.judge(texts["validation"], options.margin)
    lines = [
        f"{out}: {trained!r}",
        *(
            f"{name}: {row['estimate']:+.4f} nats on {row['n_documents']} validation documents"
            for name, row in before["validation"].items()
        ),
        repr(verdict),
        f"next: gainlens slim --model {out} --plan {out / 'plan.json'} --out slim",
    ]
    found = {
        "untrained": before,
        "verdict": verdict.to_json(),
        "model": options.model,
        "text": options.text,
    }
    if processes.first:
        figure = part / FIGURE
        _draw(trained, before["monitor"], options.margin, figure)
        trained.save(out, tokenizer, found, {FIGURE: figure})
        shutil.rmtree(part)
    processes.wait()
    return {"out": str(out), **found, "lines": lines}


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What goes to ``train_virtual_width`` as it is."""
    train = tuple(part.strip() for part in options.train.split(",") if part.strip())
    named = {name: getattr(options, name) for name in SETTINGS}
    return {**named, "train": train, "seed": options.seed}


def _check(options: argparse.Namespace, out: Path) -> None:
    check_free(out)
    for name, least in (("monitor", 2), ("judge", 2), ("n_docs", 1)):
        if getattr(options, name) < least:
            flag = f"--{name.replace('_', '-')} {getattr(options, name)}"
            raise InputError(f"{flag}: expected at least {least} document(s)")
    if options.rounds < 1 or options.rounds > max(1, options.steps):
        raise InputError(f"--rounds {options.rounds}: expected 1 to --steps {options.steps}")
    if not options.margin > 0:
        raise InputError(f"--margin {options.margin}: expected a number of nats above 0")
    if options.save_every < 1:
        raise InputError(f"--save-every {options.save_every}: expected 1 or more steps")
    Settings(options.steps, **_settings(options))
    if options.plan:
        check_plan(SlicePlan.load(options.plan))
    check_writable(out.absolute().parent)


def _open_part(options: argparse.Namespace, out: Path, processes: Processes) -> Path:
    """The folder of an unfinished run, made or found to be of the same options."""
    part = check_writable(out.with_name(f"{out.name}.part"))
    asked = {k: v for k, v in sorted(vars(options).items()) if k not in ("out", "json", "verb")}
    if options.plan:  # the file may change under its name
        digest = hashlib.sha256(Path(options.plan).read_bytes()).hexdigest()
        asked["plan"] = f"{options.plan} ({digest[:12]})"
    file = part / "options.json"
    processes.wait()
    if file.exists():
        then = read_json(file)
        other = [name for name, value in asked.items() if then.get(name) != value]
        if other:
            name = other[0]
            raise InputError(
                f"{part} holds an unfinished run with --{name.replace('_', '-')} "
                f"{then.get(name)!r}, not {asked[name]!r}: give the same options to go on, or "
                "remove it"
            )
    elif processes.first:
        write_json(file, asked)
    processes.wait()
    return part


def _texts(options: argparse.Namespace, model: Any) -> dict[str, torch.Tensor]:
    """Four texts that share no document."""

    def documents(split: Any, n_docs: Any, **more: Any) -> torch.Tensor:
        found: torch.Tensor = load_tokens(
            options.text, model, n_docs=n_docs, length=options.length, split=split, **more
        )
        return found

    calibration = documents("calibration", options.n_docs + options.monitor)
    validation = documents("validation", options.judge)
    # Short documents may open with the very same words; what judges is left out of the others.
    judges = row_digests(validation)
    calibration = _without(calibration, judges)
    if len(calibration) < options.n_docs + 2:
        raise InputError(
            f"--text {options.text} has {len(calibration)} documents for calibration: expected "
            f"{options.n_docs + 2} or more (--n-docs, and 2 to be monitored)"
        )
    monitor = calibration[options.n_docs :]
    training = documents("training", "all", windows="all")
    return {
        "calibration": calibration[: options.n_docs],
        "monitor": monitor,
        "training": _without(training, judges | row_digests(monitor)),
        "validation": validation,
    }


def _without(rows: torch.Tensor, digests: set[str]) -> torch.Tensor:
    return rows[[row_digests([row]).isdisjoint(digests) for row in rows]]


def _cut(
    options: argparse.Namespace,
    model: Any,
    tokens: torch.Tensor,
    part: Path,
    processes: Processes,
) -> None:
    """Plan and refit, from the options or from before the kill; all processes probe."""
    if all(processes.gathered((part / "plan.json").exists())):
        return
    gains = None
    if options.rounds > 1 or not options.plan:
        some = options.rounds == 1 and options.score == "fisher"
        gains = gather_gains(
            model,
            tokens[:RANKING_DOCUMENTS] if some else tokens,
            (options.score,),
            progress=processes.first,
        )
    if processes.first:
        _write_cut(options, model, tokens, part, gains)
    processes.wait()


def _write_cut(
    options: argparse.Namespace,
    model: Any,
    tokens: torch.Tensor,
    part: Path,
    gains: KeyGains | None,
) -> None:
    """Plan and refit; a plan file in the place of gains."""
    rounds = options.refit_rounds if options.rounds == 1 else 0
    if options.plan:
        plan = SlicePlan.load(options.plan)
        source = open_source(model)
        plan.check_model(source.shape, source.fingerprint, source.architecture)
    else:
        cut = best_cut(
            model,
            tokens,
            1 - options.keep,
            options.scope,
            score=options.score,
            gains=gains,
            rounds=0,
        )
        plan = SlicePlan.from_cut(cut, fingerprint=model_fingerprint(model))
    start = refitted(model, tokens, plan, rounds=rounds)
    if options.rounds > 1:
        assert gains is not None
        way = nested_plans(gains, plan, options.rounds, options.score, options.scope)
        for number, one in enumerate(way[:-1], 1):
            one.save(part / WAY.format(number))
        if options.refit_rounds:
            start = refitted(model, tokens, way[0], rounds=options.refit_rounds)
    if start.maps is not None:
        maps = start.maps
        RefitCut(start.mask, maps.queries, maps.keys, dict(maps.facts)).save(
            part / "refit.safetensors"
        )
    plan.save(part / "plan.json")  # last: where it lies, the cut is whole


def _untrained(
    model: Any,
    plan: SlicePlan,
    texts: dict[str, torch.Tensor],
    options: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """What the cut costs before training, on the monitored and on the validation documents."""
    students = {"cut": Student(model, replace(plan, maps=None))}
    if plan.maps is not None:
        students["cut and refitted"] = Student(model, plan)
    found: dict[str, dict[str, Any]] = {"monitor": {}, "validation": {}}
    for where, row in found.items():
        intact = students["cut"].document_losses(texts[where], intact=True)
        for name, student in students.items():
            rise = student.document_losses(texts[where]) - intact
            row[name] = rise_verdict(
                rise, 1 - plan.fraction_kept, options.margin, trained=False
            ).to_json()
    return found


def _draw(trained: TrainingRun, before: dict[str, Any], margin: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    plot_training(
        trained.curve,
        figure.subplots(),
        untrained={name: row["estimate"] for name, row in before.items()},
        margin=margin,
    )
    figure.savefig(path, dpi=120)
