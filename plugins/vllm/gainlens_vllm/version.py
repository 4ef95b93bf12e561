"""The releases of vLLM that the plug-in was tested with."""

from __future__ import annotations

import os

from packaging.specifiers import SpecifierSet

from gainlens_vllm.errors import SlimFolderError

TESTED = ">=0.32,<0.33"
"""The range in ``pyproject.toml``."""
ANYWAY = "GAINLENS_VLLM_UNTESTED"


def check_version(found: str) -> None:
    """Raise ``SlimFolderError`` for a release of vLLM outside the tested range.

    Args:
        found: ``vllm.__version__``.
    """
    if os.environ.get(ANYWAY) == "1" or SpecifierSet(TESTED).contains(found, prereleases=True):
        return
    raise SlimFolderError(
        f"vLLM {found} was not tested with gainlens-vllm, which expects vllm{TESTED}: install one "
        f"of these, or set {ANYWAY}=1 to try it"
    )
