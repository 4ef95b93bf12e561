"""The gains file: one safetensors file, sums as tensors, everything else as a JSON header."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gainlens.errors import FileFormatError
from gainlens.files import load_tensors, save_tensors

if TYPE_CHECKING:
    from gainlens.probes.gains import KeyGains


def save_gains(gains: KeyGains, path: str | Path) -> None:
    """Write gains whole or not at all."""
    facts = {
        "model": asdict(gains.model),
        "n_tokens": gains.n_tokens,
        "n_documents": gains.n_documents,
        "texts": list(gains.texts),
        "documents": list(gains.documents),
    }
    save_tensors(path, "gains", {**gains.sums, "frequencies": gains.frequencies}, facts)


def load_gains(path: str | Path) -> KeyGains:
    """Read gains and check that every tensor has the shape that the header promises."""
    from gainlens.probes.gains import KeyGains, ModelCard

    tensors, facts = load_tensors(path, "gains")
    try:
        frequencies = tensors.pop("frequencies")
        gains = KeyGains(
            model=ModelCard(**facts["model"]),
            sums=tensors,
            n_tokens=int(facts["n_tokens"]),
            n_documents=int(facts["n_documents"]),
            texts=tuple(facts["texts"]),
            documents=tuple(facts.get("documents", ())),
            frequencies=frequencies,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path} lacks or mislabels a field of gains: {error}") from None
    for name, value in gains.sums.items():
        if tuple(value.shape) != gains.shape or value.dtype != torch.float64:
            raise FileFormatError(
                f"{path}: {name} is {value.dtype} {tuple(value.shape)}, expected float64 "
                f"{gains.shape}"
            )
        if not bool(torch.isfinite(value).all()):
            raise FileFormatError(f"{path}: {name} holds NaN or infinity")
    return gains
