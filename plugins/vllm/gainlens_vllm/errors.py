"""What the plug-in refuses. Each message is one line: what, where and what was expected."""

from __future__ import annotations


class SlimFolderError(ValueError):
    """A folder, or a setting of vLLM, that the plug-in can't serve."""
