"""``gainlens generate``: let a written folder go on from a prompt."""

from __future__ import annotations

import argparse
from typing import Any

from gainlens.cli.verbs.common import add_last, check_device, not_negative, whole
from gainlens.export.running import generate_text, open_folder

HELP = "let a written folder (or a model by name) go on from a prompt"
EXAMPLES = ['gainlens generate slim "The state of the union is" --max-new-tokens 40']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument("folder", help="written by gainlens slim or train, or a model's name")
    parser.add_argument("prompt", help="text to go on from")
    parser.add_argument("--max-new-tokens", type=whole(1), default=40, help="upper bound")
    parser.add_argument(
        "--temperature", type=not_negative, default=0.0, help="of sampling; 0: the likeliest token"
    )
    add_last(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Generate and print."""
    check_device(options.device)
    model, tokenizer = open_folder(options.folder, options.device)
    text = generate_text(
        model,
        tokenizer,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    return {"prompt": options.prompt, "text": text, "lines": [options.prompt + text]}
