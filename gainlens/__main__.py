"""``python -m gainlens``."""

import sys

from gainlens.report.cli import main

sys.exit(main())
