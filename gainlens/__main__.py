"""``python -m gainlens``."""

import sys

from gainlens.cli.main import main

sys.exit(main())
