"""Handle Ctrl-C while the command line imports its libraries: print one line, not a traceback.

The package is imported before any of its functions can run, so this must be its first import.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any, NoReturn


def _stop(*_: Any) -> NoReturn:
    os.write(2, b"gainlens: interrupted\n")
    os._exit(128 + signal.SIGINT)


def _is_command() -> bool:
    """Whether this process is ``gainlens`` or ``python -m gainlens``, not another program."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    words = list(getattr(sys, "orig_argv", ()))
    module = name == "-m" and "-m" in words and words[words.index("-m") + 1 :][:1] == ["gainlens"]
    return module or name in ("gainlens", "gainlens.exe")


def started() -> None:
    """Restore the default Ctrl-C handling."""
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if (
    _is_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _stop)
