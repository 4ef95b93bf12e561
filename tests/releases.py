"""What the installed transformer-lens has."""

from __future__ import annotations

import transformer_lens

try:  # transformer-lens 4 raises ImportError for the name, which hasattr doesn't catch
    HAS_HOOKED = transformer_lens.HookedTransformer is not None
except ImportError:
    HAS_HOOKED = False
