"""What several verbs share: loading, checks before hours of work."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from gainlens.data.splits import Split
from gainlens.errors import InputError
from gainlens.model import load_model, load_tokens
from gainlens.probes import KeyGains, probe_gains


def add_text_arguments(parser: argparse.ArgumentParser, *, n_docs: int) -> None:
    """``--n-docs`` and ``--length``."""
    parser.add_argument("--n-docs", type=int, default=n_docs, help=f"documents ({n_docs})")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (256)")


def open_model(options: argparse.Namespace) -> Any:
    """Load the model on the device asked for."""
    device = str(options.device)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: no CUDA device is available here")
    try:
        torch.device(device)
    except RuntimeError:
        raise InputError(f"--device {device!r} is not a device that torch knows") from None
    return load_model(options.model, device=device)


def text(options: argparse.Namespace, model: Any, split: Split) -> torch.Tensor:
    """Tokens of one split of ``--text``."""
    found: torch.Tensor = load_tokens(
        options.text, model, n_docs=options.n_docs, length=options.length, split=split
    )
    return found


def gains_of(options: argparse.Namespace, model: Any) -> KeyGains:
    """Gains from ``--gains`` or probed on the calibration split."""
    if getattr(options, "gains", None):
        return KeyGains.load(options.gains)
    return probe_gains(model, text(options, model, "calibration"))


def fractions(value: str) -> tuple[float, ...]:
    """Parse ``0.25,0.5``."""
    try:
        return tuple(float(part) for part in value.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a list of numbers") from None
