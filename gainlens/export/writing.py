"""``export_model``: write a checkpoint for an engine, check it, and only then put it in place."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from gainlens.errors import GainlensError, InputError
from gainlens.export.building import float_copy
from gainlens.export.card import write_card
from gainlens.export.engines import ENGINES, Engine, EngineLimitError, get_engine
from gainlens.export.modeling import plan_of, plan_pairs, slim_config
from gainlens.export.plan import SlicePlan
from gainlens.export.slim_model import biases_of
from gainlens.export.sources import open_source
from gainlens.files import check_free, written_folder
from gainlens.model.context import context_of
from gainlens.model.stored_weights import is_offloaded
from gainlens.stats.verdicts import Verdict

GATE = 1e-4
"""Largest logit difference over the largest logit (or over 1 where that is smaller)."""
EXACT = 10**9
"""Largest number of weights at which a second look is taken in float64."""
PLAN = "slice_plan.json"
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
    verdict: Any | None = None,
    command: str | None = None,
) -> Path:
    """Write ``slim`` for an engine, run the written files, and keep them only if they agree.

    The files are written beside ``folder`` and run there. Their logits are compared with those of
    the original with the same units ablated, as ``slim`` recorded them (with those of the slim
    model itself if it has been trained or loaded since), and on a longer text with those of the
    slim model. Files in a lower precision are compared with a slim model whose weights are rounded
    in the same way. llama.cpp itself runs its file where ``xllamacpp`` is installed. Then the
    folder appears in one step, with the plan in ``slice_plan.json`` and the checksums of its files
    in ``SHA256SUMS``. If anything fails, nothing is left.

    Args:
        slim: from ``gainlens.slim`` or ``gainlens.load_slim``.
        folder: the folder to create; it may exist if it is empty.
        engine: ``gainlens`` (any plan), ``transformers``, ``vllm`` or ``llama.cpp``.
        precision: format of the weights, one of the engine's; by default its first (``f32``).
        tokenizer: a transformers tokenizer to save with the model, with its chat template; by
            default that of the model that was cut, if it had one. For ``llama.cpp``, the path of a
            GGUF file of the original, whose vocabulary is copied: llama.cpp loads a file without a
            vocabulary but cannot serve it. A folder without a tokenizer gives a warning.
        verdict: a ``Verdict`` on what the cut costs, for the model card (``README.md``).
        command: the command that made the folder, for the model card.

    Returns:
        The folder.

    Raises:
        InputError: the folder is not empty, not writable or being written by another process; the
            disk is full; the engine or precision is unknown; the model is not slim; the engine does
            not accept the tokenizer.
        EngineLimitError: the engine does not support the plan; the message names the limit, and
            ``.nearest`` is the nearest plan that fits.
        ParityError: the files do not compute what they should.

    Example:
        >>> slim = gl.slim(model, mask)
        >>> folder = gl.export_model(slim, "out", engine="gainlens")
        >>> (folder / "config.json").exists()
        True
    """
    row = get_engine(engine)
    slim = getattr(slim, "_orig_mod", slim)  # what torch.compile wrapped
    plan = plan_of(getattr(slim, "config", None))
    chosen = row.precisions[0] if precision is None else precision
    if chosen not in row.precisions:
        raise InputError(
            f"precision={precision!r}: engine={engine!r} writes {', '.join(row.precisions)}"
        )
    if verdict is not None and not isinstance(verdict, Verdict):
        raise InputError(f"verdict={verdict!r}: expected a gainlens Verdict or None")
    if tokenizer is None and not row.reads_gguf:
        tokenizer = getattr(slim, "gainlens_tokenizer", None)
    check_free(Path(folder))
    row.check(slim)
    check_streams(row, slim)
    row.check_tokenizer(tokenizer, int(slim.config.vocab_size))
    _say(row, slim)
    if tokenizer is None:
        warnings.warn(
            f"folder {str(folder)!r} gets no tokenizer: pass tokenizer= ("
            + ("a GGUF file of the original)" if row.reads_gguf else "the original's)"),
            stacklevel=2,
        )
    with written_folder(Path(folder)) as beside:
        row.write(float_copy(slim), beside, chosen, tokenizer)
        check_parity(row, slim, beside, chosen)
        plan.save(beside / PLAN)
        write_card(
            beside,
            slim,
            row,
            chosen,
            name=Path(folder).absolute().name,
            tokenizer=tokenizer is not None,
            verdict=verdict,
            command=command,
        )
    return Path(folder)


def check_plan(model: Any, plan: SlicePlan, engine: str) -> None:
    """Raise, and warn of, what ``export_model`` would, before anything is cut.

    Args:
        model: that is to be made slim, of any of the three kinds.
        plan: for it.
        engine: as for ``export_model``.

    Raises:
        InputError: an unknown engine; a plan of another model or that splits a rotary pair.
        EngineLimitError: the engine can't run such a model, or such a plan of it.
        UnsupportedModelError: the model can't be made slim.
    """
    source = open_source(model)
    plan.check_model(source.shape, source.fingerprint, source.architecture)
    plan.check_pairs(plan_pairs(source.family, source.config, plan))
    config = slim_config(source.config, source.family, plan, biases_of(source, plan))
    row = get_engine(engine)
    row.check(SimpleNamespace(config=config))
    check_streams(row, model)
    _say(row, SimpleNamespace(config=config))


def check_streams(engine: Engine, model: Any) -> None:
    """Raise ``EngineLimitError`` if the weights are not in memory and the engine needs them there.

    Args:
        engine: that is to write.
        model: of any of the three kinds, slim or not.
    """
    if is_offloaded(model) and not engine.streams:
        able = ", ".join(repr(name) for name, row in ENGINES.items() if row.streams)
        raise EngineLimitError(
            f"engine={engine.name!r} writes from memory, where not all weights of this model are: "
            f"expected engine={able}, or a model loaded without device_map"
        )


def _say(engine: Engine, slim: Any) -> None:
    """Warn of the engine's limits before any work."""
    for note in engine.notes(slim):
        warnings.warn(f"engine={engine.name!r}: {note}", stacklevel=3)


def check_parity(engine: Engine, slim: Any, folder: Path, precision: str) -> float:
    """Run the written files and return the largest difference of the logits.

    Files in ``f32`` are compared with ``slim`` in float32 and, if it is float32 and untrained, with
    the masked original. Files with rounded weights are compared with a slim model whose weights are
    rounded in the same way. The effect of rounding is not a fault of the files, and a tolerance
    that covered it would hide real faults. On random tokens some models amplify the rounding of
    float32 itself to more than ``GATE``; those of up to ``EXACT`` weights are then run in float64.

    Raises:
        ParityError: it is above ``GATE``.
    """
    vocabulary = int(slim.config.vocab_size)
    length = min(LONG, context_of(slim) or LONG)
    generator = torch.Generator().manual_seed(1)
    long = torch.randint(0, vocabulary, (1, length), generator=generator)
    parity = getattr(slim, "gainlens_parity", None)
    if parity is not None and parity.logits.shape[-1] != vocabulary:
        parity = None  # the embedding was resized since: nothing of the original's compares
    texts = [long] if parity is None else [long, parity.tokens]
    whose = "the masked original's"
    model = _copy_for(engine, slim, precision)
    if precision != "f32":
        whose = f"those of the slim model with weights rounded to {precision}"
    with torch.no_grad():
        wanted = [model(t, use_cache=False).logits for t in texts]
    fault = engine.fault(folder, model, precision)
    if fault is not None:
        raise ParityError(f"engine={engine.name!r}: {fault}; nothing was written")
    del model
    if parity is not None and precision == "f32" and slim.dtype == torch.float32:
        changed = float((wanted[1] - parity.logits).abs().max())
        if changed <= 2 * parity.difference + 1e-6:  # not trained since
            wanted[1] = parity.logits
    where = {"": "disk"} if is_offloaded(slim) else None
    worst, share = _difference(engine.logits(folder, texts, where), wanted)
    if not share <= GATE and where is None and slim.num_parameters() <= EXACT:
        model = _copy_for(engine, slim, precision).double()
        with torch.no_grad():
            wanted = [model(t, use_cache=False).logits for t in texts]
        del model
        whose += ", in float64,"
        share = _difference(engine.logits(folder, texts, dtype=torch.float64), wanted)[1]
    if not share <= GATE:
        raise ParityError(
            f"the files for engine={engine.name!r} give logits that differ from {whose} by "
            f"{share:.1e} of the largest, expected at most {GATE:.0e}; nothing was written"
        )
    return worst


def _copy_for(engine: Engine, slim: Any, precision: str) -> Any:
    """What the files are compared with: rounded as they are."""
    if precision == "f32":
        return float_copy(slim)
    return float_copy(slim, partial(engine.rounded, precision=precision))


def _difference(
    got: list[Float[torch.Tensor, "..."]], wanted: list[Float[torch.Tensor, "..."]]
) -> tuple[float, float]:
    """Largest difference of logits, and as a share of the largest logit; NaN stays NaN."""
    worst = [float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True)]
    shares = [one / max(1.0, float(b.abs().max())) for one, b in zip(worst, wanted, strict=True)]
    return float(np.max(worst)), float(np.max(shares))
