"""``gainlens generate``: continue a prompt with an exported folder."""

from __future__ import annotations

import argparse
from typing import Any

from gainlens.cli.verbs.common import add_last, check_device, not_negative, whole
from gainlens.export.running import generate_text, open_folder

HELP = "continue a prompt with an exported folder (or a model by name)"
EXAMPLES = ['gainlens generate slim "The state of the union is" --max-new-tokens 40']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument("folder", help="written by gainlens slim or train, or a model's name")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument(
        "--max-new-tokens", type=whole(1), default=40, help="maximum number of new tokens"
    )
    parser.add_argument(
        "--temperature",
        type=not_negative,
        default=0.0,
        help="sampling temperature; 0: the most likely token",
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
