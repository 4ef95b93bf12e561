"""Errors that a caller can cause. Each message is one line: what, where and what was expected."""

from __future__ import annotations


class GainlensError(Exception):
    """Base class of all errors that gainlens raises on purpose.

    Example:
        >>> try:
        ...     gl.KeyMask.quietest(gains, fraction=2)
        ... except gl.GainlensError as error:
        ...     print(type(error).__name__)
        InputError
    """


class InputError(GainlensError, ValueError):
    """An argument, a text or a model's weights are not valid for the call."""


class UnsupportedModelError(GainlensError):
    """gainlens can't cut this model's keys correctly; the message says why."""


class SilentSiteError(GainlensError, RuntimeError):
    """A required hook did not fire, so there is no data to compute a result from."""


class FileFormatError(GainlensError):
    """A file is truncated, has another format version, or is not a gainlens file."""
