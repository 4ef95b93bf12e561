"""The folder of a trained model: a plain checkpoint at full width, the plan, how it came about."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gainlens.environment import environment
from gainlens.errors import FileFormatError, InputError, UnsupportedModelError
from gainlens.export.building import without_weights
from gainlens.export.plan import SlicePlan
from gainlens.export.sources import open_source
from gainlens.files import check_free, check_writable, write_json

PLAN, FACTS = "plan.json", "training.json"


def save_folder(
    folder: str | Path,
    model: Any,
    plan: SlicePlan,
    facts: Mapping[str, Any],
    tokenizer: Any,
    files: Mapping[str, Path] | None = None,
) -> Path:
    """Write checkpoint, ``plan.json`` and ``training.json`` beside ``folder`` and rename.

    Args:
        folder: a new or an empty one.
        model: the trained model, any of the three kinds.
        plan: with the trained model's fingerprint.
        facts: for ``training.json``.
        tokenizer: saved with the checkpoint; None for none.
        files: more of them to copy into the folder, by name.

    Raises:
        InputError: the folder holds something or can't be written, the disk is full.
        UnsupportedModelError: a model whose weights lie in no transformers layout.
    """
    target = check_free(folder)
    whole = transformers_model(model)
    check_writable(target.parent)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        whole.save_pretrained(beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        plan.save(beside / PLAN)
        write_json(beside / FACTS, {**facts, **environment()})
        for name, file in (files or {}).items():
            shutil.copyfile(file, beside / name)
        beside.chmod(0o755)
        for file in beside.iterdir():  # safetensors makes files that only their owner reads
            file.chmod(0o644)
        os.replace(beside, target)
    except Exception as error:
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise InputError(f"folder {str(target)!r} can't be written: {reason}") from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def transformers_model(model: Any) -> Any:
    """The weights of ``model`` in a transformers model of the original's class.

    A bridge has rewired the model inside it, so its weights go into a new one, without a copy.

    Raises:
        UnsupportedModelError: a HookedTransformer, or a bridge that trains its own parts of a
            joint query-key-value matrix.
    """
    if not hasattr(model, "hook_dict"):
        return model
    source = open_source(model)
    tensors = getattr(source, "tensors", None)
    if tensors is None or source.family.key_site in ("query_key_value", "c_attn"):
        raise UnsupportedModelError(
            f"{type(model).__name__} of {source.architecture} keeps its weights in a layout of its "
            "own: train the transformers model itself, or write gainlens.slim(model, run.plan) "
            "with gainlens.export_model"
        )
    whole = without_weights(lambda: type(model.original_model)(source.config))
    wanted = whole.state_dict()
    buffers = dict(whole.named_buffers())
    state = {name: tensors.get(name, buffers.get(name)) for name in wanted}
    whole.load_state_dict(state, strict=True, assign=True)
    whole.tie_weights()
    whole.generation_config = getattr(model.original_model, "generation_config", None)
    return whole.eval()


def healed_from(folder: str | Path) -> str | None:
    """The name of the model that ``gainlens train`` healed into this folder; None for others.

    Raises:
        FileFormatError: the folder's ``training.json`` is damaged.
    """
    file = Path(folder) / FACTS
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        name = found.get("model")
    except (OSError, ValueError, AttributeError) as error:
        raise FileFormatError(f"{file} can't be read: {error}") from None
    return str(name) if name else None
