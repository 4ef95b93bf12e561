"""The command line: ``gainlens VERB``, the verbs being the rows of ``gainlens.cli.verbs``.

Exit status 0 for done, 2 for bad input with one line that says what and where, 130 if
interrupted, 143 if ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

from gainlens.cli.parser import build_parser
from gainlens.cli.verbs import COMMANDS
from gainlens.errors import GainlensError


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


if __name__ == "__main__":
    sys.exit(main())
