"""``gainlens evaluate``: loss of a folder on texts, its scores on tasks, lm-evaluation-harness."""

from __future__ import annotations

import argparse
from typing import Any

from gainlens.analysis.task_running import fitting_tasks
from gainlens.cli.verbs.common import (
    add,
    add_last,
    check_device,
    check_text,
    length_for,
    names,
    needs,
    whole,
)
from gainlens.errors import InputError
from gainlens.export.judging import losses_by_text, score_slim
from gainlens.export.running import harness_scores, open_folder
from gainlens.model import load_tokens
from gainlens.model.context import context_of
from gainlens.model.loading import load_hf

HELP = "measure the loss of an exported folder (or a model by name) on one or more texts"
EXAMPLES = [
    "gainlens evaluate slim --original smollm2 --text sotu,pydoc",
    "gainlens evaluate slim --original smollm2 --prompts 24 --task-lengths 1024,2048",
    "gainlens evaluate slim --tasks hellaswag --limit 100",
]


PROMPT = 1024


def lengths(value: str) -> tuple[int, ...]:
    """Argument type: several numbers of tokens, such as ``1024,2048``."""
    return tuple(whole(2)(part) for part in names(value))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument("folder", help="written by gainlens slim or train, or a model's name")
    parser.add_argument("--original", help="the intact model, to compute the rise of the loss")
    parser.add_argument(
        "--text",
        type=names,
        default=("sotu",),
        help="texts, as for --text of other commands",
    )
    add(parser, "margin", n_docs=16, length=None)
    parser.add_argument(
        "--prompts",
        type=whole(0),
        default=0,
        help="prompts for each task where a mean loss is blind (needles and the like); 0: none",
    )
    parser.add_argument(
        "--task-lengths",
        type=lengths,
        help=f"tokens of those prompts (default: {PROMPT}, or the model's context if that is "
        "shorter)",
    )
    parser.add_argument("--tasks", type=names, help="tasks of lm-evaluation-harness, if installed")
    parser.add_argument("--limit", type=whole(1), help="examples per task (default: all)")
    add_last(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print."""
    check_device(options.device)
    if options.prompts == 1:
        raise InputError("--prompts 1: expected 2 or more, or 0 for none")
    if options.tasks:
        needs("lm_eval", "--tasks")
    for text in options.text:
        check_text(text, validation=options.n_docs)
    model, tokenizer = open_folder(options.folder, options.device)
    original = options.original
    intact = None if original is None else load_hf(original, device=options.device)
    length = length_for(options, model)
    texts = {
        name: load_tokens(name, tokenizer, n_docs=options.n_docs, length=length, split="validation")
        for name in options.text
    }
    found = losses_by_text(model, texts, intact, options.margin)
    lines = []
    for name, row in found.items():
        lines.append(
            f"{name}: loss {row['loss']:.4f} nats per token on {row['n_documents']} validation "
            f"documents of {'mixed lengths' if length == 'mixed' else f'{length} tokens'}"
        )
        if "verdict" in row:
            verdict = row["verdict"]
            low, high = verdict["interval"]
            lines.append(
                f"{name}: {verdict['estimate']:+.4f} nats [{low:+.4f}, {high:+.4f}] over the "
                f"intact {original}; {verdict['status']}: {verdict['claim']}"
            )
    blind, fitting, why, sizes = None, list[str](), list[str](), (PROMPT,)
    if options.prompts:
        sizes = options.task_lengths or (min(PROMPT, context_of(model) or PROMPT),)
        fitting, why = fitting_tasks(tokenizer, sizes, options.prompts, options.seed)
        lines += [f"skipped: {reason}" for reason in why]
    if options.prompts and fitting:
        blind = score_slim(
            model,
            intact,
            tokenizer,
            tasks=fitting,
            lengths=sizes,
            n=options.prompts,
            seed=options.seed,
        )
        lines += blind.summary().splitlines()
    scores = {}
    if options.tasks:
        scores = harness_scores(model, tokenizer, options.tasks, limit=options.limit)
        lines += [
            f"{task}: {', '.join(f'{metric} {value:.4g}' for metric, value in row.items())}"
            for task, row in scores.items()
        ]
    return {
        "folder": options.folder,
        "original": original,
        "texts": found,
        "tasks": scores,
        "prompts": None if blind is None else blind.to_json(),
        "skipped": why,
        "lines": lines,
    }
