"""Errors that a caller can cause. Each message is one line: what, where, what was expected."""

from __future__ import annotations


class GainlensError(Exception):
    """Base of every error that gainlens raises on purpose."""


class InputError(GainlensError, ValueError):
    """An argument, a text or a model's weights are not what the call needs."""


class UnsupportedModelError(GainlensError):
    """The model keeps its keys in a way that gainlens can't cut honestly; the message says why."""


class SilentSiteError(GainlensError, RuntimeError):
    """A hook that had to fire stayed silent, so a result would be made of nothing."""


class FileFormatError(GainlensError):
    """A file is truncated, of another version, or not a gainlens file."""
