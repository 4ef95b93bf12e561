"""Time the attention kernels beside other ways to compute the same rows.

    python benchmarks/kernels.py [--quick] [--only NAME] [--minutes 30]

The code is in ``kernels/bench``, which works without gainlens; its arguments are passed on. Writes
``docs/results/kernels_cpu.json`` or ``kernels_cuda.json`` and the same ledger as a table.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1] / "kernels/bench"

if __name__ == "__main__":
    sys.path.insert(0, str(BENCH))  # its modules import each other by name
    runpy.run_path(str(BENCH / "run.py"), run_name="__main__")
