"""``gainlens slim``: write a physically smaller model, for gainlens' own or a stock engine."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int

from gainlens.ablation import RefitCut
from gainlens.cli.verbs.common import add_text_arguments, open_model, text
from gainlens.errors import InputError
from gainlens.export import (
    ENGINES,
    EngineLimitError,
    SlicePlan,
    canonical_plan,
    export_model,
    slim,
)
from gainlens.export.plan import BASES
from gainlens.export.recipe import mean_loss, refit_of, training_free_cut
from gainlens.export.sources import open_source
from gainlens.export.speed_ledger import CONTEXTS, ledger, sizes
from gainlens.export.writing import check_plan
from gainlens.files import check_free, check_writable, write_json
from gainlens.model import load_tokens
from gainlens.model.loading import load_hf
from gainlens.model.zoo import smollm2
from gainlens.probes import KeyGains
from gainlens.training.folder import healed_from

HELP = "write a physically smaller model, and what it saves"
OUT = "slim"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments besides the common ones."""
    add_text_arguments(parser, n_docs=24)
    parser.add_argument("--keep", type=float, default=0.5, help="share of key dimensions that stay")
    parser.add_argument(
        "--values", type=float, help="share of value dimensions that stay (all; vllm: as keys)"
    )
    parser.add_argument("--plan", help="a plan file, in the place of --keep, --values and --scope")
    parser.add_argument("--gains", help="a gains file; without it the calibration text is probed")
    parser.add_argument("--score", default="fisher", help="which gain ranks the units")
    parser.add_argument("--scope", help="head, layer, model, universal (stock engines need that)")
    parser.add_argument(
        "--basis",
        default="own",
        choices=BASES,
        help="canonical: keep the strongest singular directions of each head's query-key product "
        "(models without rotation, GPT-2), with no text, score or refit",
    )
    parser.add_argument(
        "--refit-rounds",
        type=int,
        help="least-squares refit of what stays; 0: none (2, with --plan 0)",
    )
    parser.add_argument("--refit", help="a refit file, in the place of --plan")
    parser.add_argument(
        "--judge", type=int, default=8, help="validation documents whose loss is given (0: none)"
    )
    parser.add_argument("--engine", default="gainlens", help=", ".join(ENGINES))
    parser.add_argument("--precision", help="f32, f16, bf16; for llama.cpp f32, f16, q8_0")
    parser.add_argument("--ledger", action="store_true", help="time it before and after as well")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Cut, write, check, count."""
    out = Path(options.out)
    if options.engine not in ENGINES:
        raise InputError(f"--engine {options.engine!r} is not one of {', '.join(ENGINES)}")
    known = ENGINES[options.engine].precisions
    if options.precision not in (None, *known):
        raise InputError(
            f"--precision {options.precision!r}: --engine {options.engine} writes "
            f"{', '.join(known)}"
        )
    if options.plan and options.refit:
        raise InputError("--plan and --refit both say what stays: expected one of them")
    for name in ("keep", "values"):
        share = getattr(options, name)
        if share is not None and not 0 < share <= 1:
            raise InputError(f"{name}={share!r}: expected a share above 0 and up to 1")
    existed = _check_free(out)
    model = open_model(options)
    open_source(model)  # refuses before minutes of probing
    judge = None
    if options.judge:
        judge = load_tokens(
            options.text, model, n_docs=options.judge, length=options.length, split="validation"
        )
    plan, refit, tokens = _cut(options, model)
    thin = slim(model, plan, tokens, refit=refit)
    export_model(
        thin,
        out,
        options.engine,
        precision=options.precision,
        tokenizer=_tokenizer(options, model),
    )
    try:
        plan.save(out / "slice_plan.json")
    except InputError:
        for entry in out.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if not existed:
            out.rmdir()
        raise
    full = slim(model, SlicePlan.identity(model))
    del model
    before, after = sizes(full), sizes(thin)
    result: dict[str, Any] = {
        "out": str(out),
        "engine": options.engine,
        "parity": thin.gainlens_parity.difference,
        "refit": None if refit is None else refit.facts,
        "full": vars(before),
        "slim": vars(after),
    }
    keys, values_before = before.key_bytes, before.value_bytes
    lines = [
        f"{out}: {plan!r}{', refitted,' if refit else ''} for {options.engine}, logits within "
        f"{thin.gainlens_parity.difference:.1e} of the masked original's",
        f"parameters {before.parameters:,} -> {after.parameters:,}; cache per token "
        f"{keys + values_before:,} -> {after.key_bytes + after.value_bytes:,} bytes "
        f"(keys {keys:,} -> {after.key_bytes:,})",
    ]
    if judge is not None:
        losses, whose = _losses(options.model, full, thin, judge)
        result["validation_loss"] = losses
        lines.append(
            f"loss {losses['full']:.3f}{whose} -> {losses['slim']:.3f} nats per token "
            f"({losses['slim'] - losses['full']:+.3f}) on {len(judge)} validation documents"
        )
    if options.ledger:
        found = ledger(full, thin, baseline=load_hf(options.model), contexts=CONTEXTS)
        where = out.parent / f"{out.name}.ledger.json"
        write_json(where, found)
        result["ledger"] = found
        for row in found["contexts"]:
            lines.append(
                f"{row['context']:>7,} tokens: decode x{row['decode_ratio']:.2f} (predicted "
                f"x{row['predicted']['decode_ratio']:.2f}; x"
                f"{row['decode_ratio_to_best_transformers']:.2f} of {row['best_transformers']}), "
                f"prefill x{row['prefill_ratio']:.2f}"
            )
        lines += [found["twice_as_fast"]["verdict"], f"{where}: the ledger"]
    return {**result, "lines": lines}


def _losses(
    name: str, full: Any, thin: Any, judge: Int[torch.Tensor, "document pos"]
) -> tuple[dict[str, Any], str]:
    """Before and after the cut. A healed model is compared with the one that it was healed from.

    Its own loss at full width says nothing: healing left the cut units as they were, among
    weights that have learned to do without them.
    """
    losses: dict[str, Any] = {"documents": len(judge)}
    original = healed_from(name)
    if original is None:
        losses["full"] = mean_loss(full, judge)
    else:
        intact = load_hf(original)
        losses["full"], losses["full_model"] = mean_loss(intact, judge), original
    losses["slim"] = mean_loss(thin, judge)
    return losses, "" if original is None else f" (intact {original})"


def _cut(
    options: argparse.Namespace, model: Any
) -> tuple[SlicePlan, RefitCut | None, torch.Tensor | None]:
    """The plan, its refit and the calibration text, as the options say."""
    rounds = options.refit_rounds
    if options.refit:
        cut = RefitCut.load(options.refit)
        plan = SlicePlan.from_mask(cut, values=options.values)
        _check_plan(options, model, plan)
        tokens = text(options, model, "calibration") if plan.value_widths else None
        return plan, cut, tokens
    if options.plan:
        plan = _own_plan(options.plan, options.model)
        _check_plan(options, model, plan)
        needed = plan.value_widths or rounds
        tokens = text(options, model, "calibration") if needed else None
        return plan, refit_of(model, tokens, plan, rounds=rounds) if rounds else None, tokens
    own = options.engine == "gainlens"
    values = options.values
    if values is None and not ENGINES[options.engine].wide_values:
        values = options.keep
    scope: Any = options.scope or ("head" if own else "universal")
    if options.basis == "canonical":
        plan = canonical_plan(model, options.keep, scope).with_values(values)
        _check_plan(options, model, plan)
        return plan, None, text(options, model, "calibration") if values else None
    tokens = text(options, model, "calibration")
    plan, _ = training_free_cut(
        model,
        tokens,
        options.keep,
        gains=KeyGains.load(options.gains) if options.gains else None,
        score=options.score,
        scope=scope,
        values=values,
        rounds=0,
    )
    _check_plan(options, model, plan)
    rounds = 2 if rounds is None else rounds
    return plan, refit_of(model, tokens, plan, rounds=rounds) if rounds > 0 else None, tokens


def _check_plan(options: argparse.Namespace, model: Any, plan: SlicePlan) -> None:
    """As ``check_plan``; the error names the options that give the nearest plan."""
    try:
        check_plan(model, plan, options.engine)
    except EngineLimitError as error:
        if error.nearest is None:
            raise
        keep = f"--scope universal --keep {error.nearest.fraction_kept:g}"
        raise EngineLimitError(f"{error} (here: {keep})", error.nearest) from None


def _check_free(out: Path) -> bool:
    """Whether the folder exists; raises unless it is empty and writable, or can be made."""
    check_free(out, "--out")
    there = out.absolute()
    while not there.exists():  # nothing is made before there is something to put in it
        there = there.parent
    check_writable(there)
    return there == out.absolute()


def _own_plan(file: str, model: str) -> SlicePlan:
    """A plan file. One that lies in the checkpoint's own folder was made for what it became.

    Healing changes the weights that the plan's fingerprint is of.
    """
    plan = SlicePlan.load(file)
    if Path(model).is_dir() and Path(file).absolute().parent == Path(model).absolute():
        plan = replace(plan, fingerprint=None)
    return plan


def _tokenizer(options: argparse.Namespace, model: Any) -> Any | None:
    """What the engine's checkpoint takes its vocabulary from."""
    if options.engine == "llama.cpp":
        return smollm2.packaged_gguf() if options.model == "smollm2" else None
    return getattr(model, "tokenizer", None)
