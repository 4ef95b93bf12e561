"""The verbs of the command line: one module and one row each.

A module has ``HELP``, ``EXAMPLES`` (commands that run as written), ``add_arguments(parser)`` and
``run(options) -> dict``. The ``lines`` of the dict are printed, or the whole dict with ``--json``.
"""

from __future__ import annotations

from types import ModuleType

from gainlens.cli.verbs import bench, evaluate, generate, probe, report, slim, surgery, train
from gainlens.cli.verbs import map as map_command

COMMANDS: dict[str, ModuleType] = {
    "probe": probe,
    "surgery": surgery,
    "map": map_command,
    "train": train,
    "slim": slim,
    "generate": generate,
    "evaluate": evaluate,
    "report": report,
    "bench": bench,
}
