"""``export_model``: write a checkpoint for an engine, check it, and only then put it in place."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from gainlens.errors import GainlensError, InputError
from gainlens.export.engines import Engine, get_engine
from gainlens.export.modeling import plan_of

LOSSY = 1e-1
"""What is allowed of a slim model whose own weights are in half precision."""
LONG = 96
"""Positions of the longer text on which written files are compared with the slim model."""


class ParityError(GainlensError):
    """Written files compute something else than the masked original; nothing was kept."""


def export_model(
    slim: Any,
    folder: str | os.PathLike[str],
    engine: str = "gainlens",
    *,
    precision: str | None = None,
    tokenizer: Any | None = None,
) -> Path:
    """Write ``slim`` for an engine, run the written files, and put them in place if they agree.

    The files are written beside ``folder`` and compared there: with the logits of the original
    with the same units ablated (as ``slim`` recorded them; with the slim model's own where it has
    been trained or loaded since) and, on a longer text, with the slim model's. Then the folder is
    renamed into place. When anything fails, nothing is left.

    Args:
        slim: from ``gainlens.slim`` or ``gainlens.load_slim``.
        folder: to be made; may exist if it is empty.
        engine: ``gainlens`` (any plan), ``transformers``, ``vllm`` or ``llama.cpp``.
        precision: of the weights, one of the engine's; its first (``f32``) by default.
        tokenizer: a transformers tokenizer to save beside; for ``llama.cpp`` the path of a GGUF
            file of the original, whose vocabulary is copied.

    Returns:
        The folder.

    Raises:
        InputError: a folder that already holds something or can't be written, a full disk, an
            unknown engine or precision, a model that is not slim.
        EngineLimitError: a plan that the engine can't take; says which limit, with the nearest
            plan that fits as ``.nearest``.
        ParityError: the files do not compute what they should.
    """
    row = get_engine(engine)
    plan_of(getattr(slim, "config", None))
    chosen = row.precisions[0] if precision is None else precision
    if chosen not in row.precisions:
        raise InputError(
            f"precision={precision!r}: engine={engine!r} writes {', '.join(row.precisions)}"
        )
    target = Path(folder)
    _check_free(target)
    row.check(slim)
    made = _make_parents(target)
    try:
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            row.write(slim, beside, chosen, tokenizer)
            check_parity(row, slim, beside, chosen)
            beside.chmod(0o755)
            for file in beside.iterdir():  # safetensors makes files that only their owner reads
                file.chmod(0o644)
            _check_free(target)
            os.replace(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except BaseException as error:
        for parent in made:
            parent.rmdir()
        if isinstance(error, GainlensError) or not isinstance(error, Exception):
            raise
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise InputError(f"folder {str(target)!r} can't be written: {reason}") from error
        raise
    return target


def check_parity(engine: Engine, slim: Any, folder: Path, precision: str) -> float:
    """Run written files and compare; the largest logit difference.

    Raises:
        ParityError: it is above the engine's tolerance.
    """
    vocabulary = int(slim.config.vocab_size)
    length = min(LONG, int(slim.config.max_position_embeddings))
    generator = torch.Generator().manual_seed(1)
    long = torch.randint(0, vocabulary, (1, length), generator=generator)
    parity = getattr(slim, "gainlens_parity", None)
    texts = [long] if parity is None else [long, parity.tokens]
    device = next(slim.parameters()).device
    with torch.no_grad():
        wanted = [slim(t.to(device), use_cache=False).logits.float().cpu() for t in texts]
    if parity is not None:
        changed = float((wanted[1] - parity.logits).abs().max())
        if changed <= 2 * parity.difference + 1e-6:  # not trained since
            wanted[1] = parity.logits
    worst = 0.0
    exact = next(slim.parameters()).dtype in (torch.float32, torch.float64) and precision == "f32"
    for got, expected in zip(engine.logits(folder, texts), wanted, strict=True):
        worst = max(worst, float((got - expected).abs().max()))
        # Rounded weights spread, so they are judged by the mean square; wrong ones reach 1 there.
        difference, size = (got - expected).abs().max(), expected.abs().max().clamp_min(1.0)
        if not exact:
            difference, size = (got - expected).norm(), expected.norm()
        share = engine.tolerance[precision] if precision != "f32" or exact else LOSSY
        if not float(difference / size) <= share:
            raise ParityError(
                f"the files for engine={engine.name!r} give logits that differ from the masked "
                f"original's by {float(difference / size):.1e} of them, expected at most "
                f"{share:.0e}; nothing was written"
            )
    return worst


def _check_free(target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        what = "already holds something" if target.is_dir() else "is a file"
        raise InputError(f"folder {str(target)!r} {what}: expected a new or an empty folder")


def _make_parents(target: Path) -> list[Path]:
    """Make the folders above ``target``; those that were missing, innermost first."""
    missing = []
    parent = target.absolute().parent
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"folder {str(target)!r} can't be written: {error.strerror or error}"
        ) from None
    return missing
