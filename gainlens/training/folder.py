"""The folder of a trained model: a plain checkpoint at full width, the plan, the record."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gainlens.ablation import KeyMask, RefitCut, SlotCut, load_cut
from gainlens.environment import environment
from gainlens.errors import FileFormatError, UnsupportedModelError
from gainlens.export.building import without_weights
from gainlens.export.plan import SlicePlan
from gainlens.export.plan_files import CUT_FILE, without_cut_file
from gainlens.export.sources import open_source
from gainlens.files import opened, read_json, sealed, write_json, written_folder

PLAN, FACTS, CUT = "plan.json", "training.json", "cut.safetensors"
KIND = "training-facts"


def save_folder(
    folder: str | Path,
    model: Any,
    plan: SlicePlan,
    facts: Mapping[str, Any],
    tokenizer: Any,
    files: Mapping[str, Path] | None = None,
) -> Path:
    """Write checkpoint, ``plan.json`` and ``training.json`` beside ``folder`` and rename.

    A plan whose maps act after a norm has them in ``cut.safetensors``; see ``with_maps``.

    Args:
        folder: a new or empty folder.
        model: the trained model, of any of the three kinds.
        plan: the plan, with the fingerprint of the trained model.
        facts: entries for ``training.json``.
        tokenizer: tokenizer to save with the checkpoint, or None.
        files: additional files to copy into the folder, by name.

    Raises:
        InputError: the folder is not empty or not writable, or the disk is full.
        UnsupportedModelError: transformers has no layout for these weights.
    """
    whole = transformers_model(model)
    cut = None if plan.maps is None else fitted_cut(model, plan)
    if cut is not None:
        plan = replace(plan, maps=None, facts={**plan.facts, CUT_FILE: CUT})
    about = sealed(KIND, {**facts, **environment()})  # refuses NaN before anything is written
    with written_folder(folder) as beside:
        whole.save_pretrained(beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        plan.save(beside / PLAN)
        if cut is not None:
            cut.save(beside / CUT)
        write_json(beside / FACTS, about)
        for name, file in (files or {}).items():
            shutil.copyfile(file, beside / name)
    return Path(folder)


def fitted_cut(model: Any, plan: SlicePlan) -> RefitCut:
    """The cut of a plan with maps.

    Args:
        model: of the plan, of any of the three kinds.
        plan: with maps.
    """
    maps = plan.maps
    assert maps is not None
    facts = {k: v for k, v in plan.facts.items() if k not in ("refit", "slots")}
    mask = KeyMask(plan.keep, {**facts, "fingerprint": plan.fingerprint})
    if plan.frequencies is None:
        return RefitCut(mask, maps.queries, maps.keys, dict(maps.facts))
    own = open_source(model).rotary_frequencies()
    return SlotCut(mask, maps.queries, maps.keys, plan.frequencies, own, None, dict(maps.facts))


def with_maps(plan: SlicePlan, folder: Path) -> SlicePlan:
    """A plan with the maps that were saved beside it; the plan itself if it needs none.

    Args:
        plan: read from a file in ``folder``.
        folder: of the plan's file.

    Raises:
        FileFormatError: the file of the maps is missing, damaged, or of another plan.
    """
    name = plan.facts.get(CUT_FILE)
    if name is None:
        return plan
    file = folder / Path(str(name)).name
    cut = load_cut(file)
    if cut.maps is None or not torch.equal(cut.keep, plan.keep):
        raise FileFormatError(f"{file} does not hold the maps of the plan beside it")
    return replace(plan, maps=cut.maps, facts=without_cut_file(plan.facts))


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
    if tensors is None or source.family.layout.joint:
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
    name = opened(read_json(file), KIND, str(file)).get("model")
    if name is not None and not isinstance(name, str):
        raise FileFormatError(f"{file}: model is {name!r}, expected the name of a model")
    return name or None
