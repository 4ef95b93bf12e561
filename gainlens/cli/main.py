"""The command line: ``gainlens VERB``, where a verb is a row of ``gainlens.cli.verbs``.

Exit status: 0 on success, 1 if the result could not be printed, 2 for bad input (with a one-line
message), 130 if interrupted, 141 if the reader of the output closed the pipe, 143 if terminated.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from gainlens.cli.parser import build_parser
from gainlens.cli.verbs import COMMANDS
from gainlens.errors import GainlensError
from gainlens.files import locked
from gainlens.starting import started


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    started()
    options = build_parser().parse_args(arguments)
    # Messages of libraries would hide the one line that matters.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    before = _tidy_when_ended()
    try:
        with _alone(options):
            result: dict[str, Any] = COMMANDS[options.verb].run(options)
    except GainlensError as error:
        return _failed(f"error: {' '.join(str(error).split())}", 2)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except BrokenPipeError:
        return _quiet()
    except (OSError, RecursionError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        gone = isinstance(error, FileNotFoundError | NotADirectoryError)
        if not (full or gone or isinstance(error, RecursionError)):
            raise
        return _failed(f"error: {' '.join(str(error).split())}", 2)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    lines = result.get("lines", ())
    return _say([json.dumps(result, ensure_ascii=False)] if options.json else lines)


def _alone(options: argparse.Namespace) -> AbstractContextManager[None]:
    """The lock of the output; with several processes, the first one holds it."""
    out = getattr(options, "out", None)
    first = int(os.environ.get("RANK") or 0) == 0
    return locked(out) if out is not None and first else nullcontext()


def _say(lines: Iterable[str]) -> int:
    """Print the result. The output files exist even if printing fails."""
    try:
        for line in lines:
            sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        return _quiet()
    except (OSError, ValueError, AttributeError) as error:  # full, or closed
        reason = getattr(error, "strerror", None) or "it is closed"
        _silence()
        return _failed(f"error: standard output can't be written: {reason}", 1)
    return 0


def _failed(message: str, status: int) -> int:
    with suppress(OSError, ValueError, AttributeError):  # stderr may be closed too
        sys.stderr.write(f"gainlens: {message}\n")
    return status


def _quiet() -> int:
    """Exit silently, as Unix tools do, when the reader has closed the pipe; returns the status."""
    _silence()
    return 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1


def _silence() -> None:
    """Redirect the last flush of the interpreter, which would otherwise print an error."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _tidy_when_ended() -> Any:
    """Make SIGTERM raise, so that half-written folders are removed; returns the old handler."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


if __name__ == "__main__":
    sys.exit(main())
