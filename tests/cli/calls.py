"""How the tests call the command line."""

from __future__ import annotations

from gainlens.cli.main import main


def status_of(arguments) -> int:
    """The exit status, also where the parser itself ends the call."""
    try:
        return main([str(word) for word in arguments])
    except SystemExit as stop:
        return int(stop.code)
