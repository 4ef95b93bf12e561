"""The parser: verbs, shared options, and hints for misspelt ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from gainlens.cli.verbs import COMMANDS
from gainlens.cli.verbs.common import shown

RENAMED = {"--keep": "--fraction (the share that is cut)", "--values": "--value-fraction"}


class Parser(argparse.ArgumentParser):
    """Reports bad arguments in one line, with the nearest valid one."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = list(map(str, action.choices))
        near = get_close_matches(str(value), known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise argparse.ArgumentError(action, f"{value!r} is not one of {', '.join(known)}{hint}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Like argparse, but reject an unknown option here, where the known ones are available."""
        found, extra = super().parse_known_args(args, namespace)
        if extra:
            unknown = extra[0].partition("=")[0]
            near = RENAMED.get(unknown) or next(
                iter(get_close_matches(unknown, list(self._option_string_actions), 1)), None
            )
            hint = f"; did you mean {near}?" if near else ""
            self.error(f"unknown argument {unknown}{hint}")
        return found, extra


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows every option with its default, and examples verbatim."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default is None or isinstance(action.default, bool):
            return text  # no default, or the text already gives it
        if action.default == argparse.SUPPRESS:
            return text
        return f"{text} (default: {shown(action.default).replace('%', '%%')})"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; a verb is one module in ``gainlens.cli.verbs``."""
    parser = Parser(
        prog="gainlens",
        description="What the key dimensions of a transformer do.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, command in COMMANDS.items():
        verb = verbs.add_parser(
            name,
            help=command.HELP,
            description=f"{command.HELP[0].upper()}{command.HELP[1:]}.",
            epilog=_examples(command.EXAMPLES),
            formatter_class=Help,
            allow_abbrev=False,
        )
        command.add_arguments(verb)
        verb.set_defaults(parsers=verbs.choices)
    return parser


def _examples(commands: Sequence[str]) -> str:
    return "\n".join(
        ["example:" if len(commands) == 1 else "examples:", *(f"  {c}" for c in commands)]
    )


def _version() -> str:
    from gainlens import __version__

    return __version__
