"""``gainlens slim``: write a physically smaller model, for gainlens or a stock engine."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from gainlens.ablation import load_cut
from gainlens.ablation.key_mask import KeyMask, Scope
from gainlens.ablation.recipe import best_cut, ranking_gains
from gainlens.cli.verbs.common import (
    add,
    add_last,
    check_text,
    fraction,
    needs,
    next_line,
    open_model,
    place,
    text,
)
from gainlens.data.batches import Tokens
from gainlens.errors import InputError
from gainlens.export import (
    ENGINES,
    EngineLimitError,
    SlicePlan,
    canonical_plan,
    export_model,
    slim,
)
from gainlens.export.after_norm import map_weights, norm_first
from gainlens.export.judging import judge_slim_by_position
from gainlens.export.modeling import family_of
from gainlens.export.plan import BASES
from gainlens.export.recipe import refitted
from gainlens.export.sources import open_source
from gainlens.export.speed_ledger import CONTEXTS, ledger, sizes
from gainlens.export.writing import check_plan
from gainlens.files import check_free, check_writable, write_json
from gainlens.model.context import LONGEST
from gainlens.model.loading import check_name, load_hf, load_tokenizer
from gainlens.model.zoo import smollm2
from gainlens.probes import KeyGains
from gainlens.training.folder import healed_from, with_maps

HELP = "write a physically smaller model and report its costs and savings"
EXAMPLES = [
    "gainlens slim --model smollm2 --fraction 0.5 --out slim",
    "gainlens slim --model smollm2 --fraction 0.5 --engine llama.cpp --precision q8_0 --out gguf",
]
PRECISIONS = tuple(dict.fromkeys(p for engine in ENGINES.values() for p in engine.precisions))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add(parser, "model", "text", n_docs=24, length=None)
    parser.add_argument("--plan", help="a plan file, instead of --fraction and --scope")
    parser.add_argument("--refit", help="a refit file, instead of --plan")
    add(parser, "gains", "fraction", score="fisher", scope=None)
    parser.add_argument(
        "--value-fraction",
        type=fraction,
        help="share of value dimensions to cut (default: none; stock engines: as for keys)",
    )
    parser.add_argument(
        "--basis",
        default="own",
        choices=BASES,
        help="canonical: keep the strongest singular directions of each head's query-key product "
        "(models without rotary embeddings, such as GPT-2), without text, score or refit",
    )
    add(parser, refit_rounds=None)
    add(parser, "margin", judge=16)
    parser.add_argument(
        "--engine",
        default="gainlens",
        choices=tuple(ENGINES),
        help="the engine that will run the model",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="of the weights (default: f32); llama.cpp: no bf16"
    )
    parser.add_argument(
        "--tokenizer",
        help="a folder, or for llama.cpp a GGUF file of the original, to copy the vocabulary from "
        "(default: the model's own)",
    )
    parser.add_argument(
        "--ledger", action="store_true", help="also time the model before and after"
    )
    add_last(parser, "slim")
    parser.set_defaults(longest=LONGEST)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Cut, write, check and evaluate the model, and count its parameters."""
    out = Path(options.out)
    original = _check(options, out)
    model = open_model(options)
    open_source(model)  # raises early, before minutes of probing
    tokenizer = _tokenizer(options, model)
    ENGINES[options.engine].check_tokenizer(tokenizer, int(model.cfg.d_vocab))
    judges = text(options, model, "validation", options.judge) if options.judge else None
    plan, tokens = _cut(options, model)
    thin = slim(model, plan, tokens)
    export_model(thin, out, options.engine, precision=options.precision, tokenizer=tokenizer)
    full = slim(model, SlicePlan.identity(model))
    del model
    before, after = sizes(full), sizes(thin)
    result: dict[str, Any] = {
        "out": str(out),
        "engine": options.engine,
        "parity": thin.gainlens_parity.difference,
        "refit": None if plan.maps is None else dict(plan.maps.facts),
        "full": vars(before),
        "slim": vars(after),
        "map_weights": map_weights(thin),
        "vocabulary": tokenizer is not None,
    }
    keys, values = before.key_bytes, before.value_bytes
    lines = [
        f"{out}: {plan!r}{', refitted,' if plan.maps else ''} for {options.engine}, logits within "
        f"{thin.gainlens_parity.difference:.1e} of the masked original's",
        f"parameters {before.parameters:,} -> {after.parameters:,}; cache per token "
        f"{keys + values:,} -> {after.key_bytes + after.value_bytes:,} bytes "
        f"(keys {keys:,} -> {after.key_bytes:,})",
    ]
    if norm_first(family_of(thin.config), thin.config):
        added = map_weights(thin)
        lines.append(
            "projections stay whole, since the norm on the keys needs all their rows"
            + (f"; the maps after it add {added:,} weights" if added else "")
        )
    if judges is not None:
        # The full-width loss of a healed model is meaningless: its cut units are unchanged, but the
        # other weights have learned to work without them.
        intact = full if original is None else load_hf(original, **place(options.device))
        trained = original is not None
        verdict, rise = judge_slim_by_position(
            thin, intact, judges, options.margin, trained=trained
        )
        result |= {
            "verdict": verdict.to_json(),
            "by_position": rise.to_json(),
            "intact": original or options.model,
        }
        low, high = verdict.interval
        lines += [
            f"loss {verdict.estimate:+.4f} nats [{low:+.4f}, {high:+.4f}] over the intact "
            f"{result['intact']}, on {len(judges)} validation documents",
            repr(verdict),
            *(f"by position, {line}" for line in rise.lines()),
        ]
    if options.ledger:
        found = ledger(full, thin, baseline=load_hf(options.model), contexts=CONTEXTS)
        where = out.parent / f"{out.name}.ledger.json"
        write_json(where, found)
        result["ledger"] = found
        lines += [*map(_speed, found["contexts"]), found["twice_as_fast"]["verdict"]]
        lines.append(f"{where}: the ledger")
    if tokenizer is None:
        more = " (a GGUF file of the original)" if options.engine == "llama.cpp" else ""
        lines.append(f"warning: no vocabulary was written; pass one with --tokenizer{more}")
    elif options.engine != "llama.cpp":
        lines.append(
            next_line(
                options, "generate", folder=out, prompt="The state of the union is", seed=None
            )
        )
    return {**result, "lines": lines}


def _cut(options: argparse.Namespace, model: Any) -> tuple[SlicePlan, Tokens | None]:
    """The plan and the calibration text for the options.

    The engine checks the plan before it is refitted.
    """
    given, rounds = options.value_fraction, options.refit_rounds
    values = None if given is None else 1 - given
    if options.refit:
        plan = SlicePlan.from_cut(load_cut(options.refit), values=values)
        _check_plan(options, model, plan)
        return plan, text(options, model, "calibration") if plan.value_widths else None
    if options.plan:
        plan = _own_plan(options.plan, options.model)
        _check_plan(options, model, plan)
        tokens = text(options, model, "calibration") if plan.value_widths or rounds else None
        return refitted(model, tokens, plan, rounds=rounds or 0), tokens
    stock = options.engine != "gainlens"
    scope: Scope = options.scope or ("universal" if stock else "layer")
    if values is None and not ENGINES[options.engine].wide_values:
        values = 1 - options.fraction
    if options.basis == "canonical":
        plan = canonical_plan(model, options.fraction, scope).with_values(values)
        _check_plan(options, model, plan)
        return plan, text(options, model, "calibration") if values else None
    tokens = text(options, model, "calibration")
    score = options.score
    gains = KeyGains.load(options.gains) if options.gains else ranking_gains(model, tokens, score)
    outline = KeyMask.quietest(gains, options.fraction, score, scope)
    _check_plan(options, model, SlicePlan.from_cut(outline, values=values))
    cut = best_cut(
        model,
        tokens,
        options.fraction,
        scope,
        score=score,
        gains=gains,
        rounds=6 if rounds is None else rounds,
    )
    return SlicePlan.from_cut(cut, values=values), tokens


def _check(options: argparse.Namespace, out: Path) -> str | None:
    """Checks before a model is loaded; returns the model from which this one was healed."""
    known = ENGINES[options.engine].precisions
    if options.precision not in (None, *known):
        raise InputError(
            f"--precision {options.precision}: --engine {options.engine} writes {', '.join(known)}"
        )
    if options.engine == "llama.cpp":
        needs("gguf", "--engine llama.cpp")
    if options.device == "disk" and not ENGINES[options.engine].streams:
        raise InputError(
            f"--engine {options.engine} writes from memory: with --device disk expected gainlens"
        )
    if options.device == "disk" and options.ledger:
        raise InputError("--ledger times models in memory: expected none with --device disk")
    if options.plan and options.refit:
        raise InputError("--plan and --refit both define what is kept: expected one of them")
    if options.judge == 1:
        raise InputError("--judge 1: a verdict needs at least 2 documents (0: none)")
    for name, load in (
        ("plan", SlicePlan.load),
        ("refit", load_cut),
        ("gains", KeyGains.load),
    ):
        if getattr(options, name):
            load(getattr(options, name))
    chosen = options.plan or options.refit or options.basis == "canonical"
    calibration = 0 if chosen else options.n_docs
    if calibration or options.judge:
        check_text(options.text, calibration=calibration, validation=options.judge)
    check_free(out, "--out")
    there = out.absolute()
    while not there.exists():  # nothing is created before there is output
        there = there.parent
    check_writable(there)
    original = healed_from(options.model) if options.judge else None
    if original is not None:
        try:
            check_name(original)
        except InputError as error:
            raise InputError(
                f"--model {options.model} was healed from another model, needed to compare "
                f"losses: {error} (--judge 0 skips the comparison)"
            ) from None
    return original


def _check_plan(options: argparse.Namespace, model: Any, plan: SlicePlan) -> None:
    """Like ``check_plan``; the error names the options for the nearest supported plan."""
    try:
        check_plan(model, plan, options.engine)
    except EngineLimitError as error:
        if error.nearest is None:
            raise
        near = f"--scope universal --fraction {1 - error.nearest.fraction_kept:g}"
        raise EngineLimitError(f"{error} (here: {near})", error.nearest) from None


def _own_plan(file: str, model: str) -> SlicePlan:
    """Read a plan file, with the maps beside it if it needs them.

    A plan in the folder of a healed checkpoint belongs to that checkpoint. Healing changes the
    weights, so the fingerprint of the plan no longer matches them.
    """
    plan = with_maps(SlicePlan.load(file), Path(file).parent)
    if Path(model).is_dir() and Path(file).absolute().parent == Path(model).absolute():
        plan = replace(plan, fingerprint=None)
    return plan


def _tokenizer(options: argparse.Namespace, model: Any) -> Any | None:
    """The source of the vocabulary for the checkpoint."""
    if options.engine == "llama.cpp":
        packaged = smollm2.packaged_gguf() if options.model == "smollm2" else None
        return options.tokenizer or packaged
    if options.tokenizer:
        return load_tokenizer(options.tokenizer)
    return getattr(model, "tokenizer", None)


def _speed(row: dict[str, Any]) -> str:
    return (
        f"{row['context']:>7,} tokens: decode x{row['decode_ratio']:.2f} (predicted "
        f"x{row['predicted']['decode_ratio']:.2f}; x{row['decode_ratio_to_best_transformers']:.2f} "
        f"of {row['best_transformers']}), prefill x{row['prefill_ratio']:.2f}"
    )
