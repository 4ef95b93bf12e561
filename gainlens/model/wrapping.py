"""Wrap a Hugging Face model as a ``TransformerBridge`` or a ``HookedTransformer``.

Nothing is folded or centred: gains refer to the checkpoint's own weights.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from gainlens.errors import UnsupportedModelError
from gainlens.model.running import evaluating, model_device
from gainlens.model.stored_weights import check_readable, read_once
from gainlens.model.text_config import text_config

CHECK_TOKENS = 16
CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Maximum relative difference of the logits by dtype; lower precisions are not checked."""


def to_bridge(hf: Any, name: str, tokenizer: Any | None) -> Any:
    """Wrap ``hf`` in place as a ``TransformerBridge``; ``hf`` must not be used directly afterwards.

    Raises:
        UnsupportedModelError: TransformerLens has no adapter for the architecture, or the wrapped
            model's logits differ from Hugging Face's.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture = architecture_of(hf)
    vocabulary = int(text_config(hf.config).vocab_size)
    # Before wrapping, which changes hf in place.
    wanted = _few_logits(hf, vocabulary, CHECK_TOKENS)
    try:
        bridge = build_bridge_from_module(
            hf, architecture, hf_config=hf.config, model_name=name, tokenizer=None
        )
    except Exception as error:
        raise UnsupportedModelError(
            f"model {name!r}: TransformerLens can't wrap architecture {architecture!r}: "
            f"{first_line(error)}"
        ) from error
    bridge = bridge.eval()
    check_readable(bridge)
    read_once(bridge.original_model)
    got = _few_logits(bridge, vocabulary, CHECK_TOKENS)
    _check_same_logits(got, wanted, name, "TransformerBridge")
    _attach_tokenizer(bridge, tokenizer)
    return bridge


def to_hooked(hf: Any, name: str, tokenizer: Any | None) -> Any:
    """A ``HookedTransformer`` with a copy of the weights of ``hf``, checked against it.

    TransformerLens translates the Hugging Face configuration. Anything it omits (such as a head
    size other than d_model / heads) would silently give a wrong model, so the logits of a few
    tokens are compared before the model is returned.

    Raises:
        UnsupportedModelError: transformer-lens 4 is installed, 3.9 doesn't convert the
            architecture, or the logits differ from Hugging Face's.
    """
    hooked_transformer = hooked_class()
    from transformer_lens import loading_from_pretrained as loading

    architecture = architecture_of(hf)
    weight, *_ = hf.parameters()
    try:
        with tempfile.TemporaryDirectory(prefix="tl-config-") as folder:
            source = _source_name(name, hf, architecture, Path(folder), loading)
            cfg = loading.get_pretrained_model_config(
                source, fold_ln=False, device=str(weight.device), dtype=weight.dtype
            )
            _correct(cfg, text_config(hf.config))
            _check_rope(cfg, text_config(hf.config))
            state = loading.get_pretrained_state_dict(source, cfg, hf_model=hf, dtype=weight.dtype)
        cfg.model_name = name
        cfg.tokenizer_name = None  # otherwise the constructor looks it up on the hub
        # Without move_to_device, whose .to() prints a message; the weights are assigned below.
        model = hooked_transformer(cfg, tokenizer=None, move_to_device=False)
        model.load_and_process_state_dict(
            state,
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
    except Exception as error:
        raise UnsupportedModelError(
            f"model {name!r}: TransformerLens can't convert architecture {architecture!r} to a "
            f"HookedTransformer ({first_line(error)}); use kind='bridge'"
        ) from error
    model = model.to(weight.device, print_details=False).eval()
    vocabulary, context = int(text_config(hf.config).vocab_size), int(model.cfg.n_ctx)
    wanted = _few_logits(hf, vocabulary, context)
    got = _few_logits(model, vocabulary, context)
    _check_same_logits(got, wanted, name, "HookedTransformer")
    _attach_tokenizer(model, tokenizer)
    return model


def hooked_class() -> Any:
    """``transformer_lens.HookedTransformer``.

    Raises:
        UnsupportedModelError: transformer-lens 4 is installed.
    """
    try:
        from transformer_lens import HookedTransformer
    except ImportError as error:
        raise UnsupportedModelError(
            "kind='hooked' needs HookedTransformer, which transformer-lens 4 no longer has: "
            "install transformer-lens 3.9, or use kind='bridge'"
        ) from error
    return HookedTransformer


def architecture_of(hf: Any) -> str:
    """The class name under which transformers and TransformerLens know the model."""
    named = getattr(hf.config, "architectures", None)
    return str(named[0]) if named else type(hf).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    text = str(error).strip()
    if "weights_only" in text or "Weights only load" in text:  # no advice to run a file's code
        return "its weights are a pickle that asks to run code: expected safetensors"
    lines = text.splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _source_name(name: str, hf: Any, architecture: str, folder: Path, loading: Any) -> str:
    """The input of TransformerLens' configuration translation: a name on its list, or a folder."""
    try:
        return str(loading.get_official_model_name(name))
    except ValueError:
        settings = json.loads(hf.config.to_json_string(use_diff=False))
        settings["architectures"] = [architecture]
        if "n_positions" in settings:  # transformers 5 no longer has GPT-2's other name for it
            settings.setdefault("n_ctx", settings["n_positions"])
        (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        return str(folder)


def _correct(cfg: Any, hf_config: Any) -> None:
    """Set values that the 3.9 translation drops or guesses: head size, context length."""
    head_dim = getattr(hf_config, "head_dim", None)
    if head_dim and head_dim != cfg.d_head:
        if cfg.rotary_dim == cfg.d_head:
            cfg.rotary_dim = head_dim
        cfg.d_head = head_dim
        cfg.attn_scale = head_dim**0.5 if cfg.use_attn_scale else 1.0
    positions = getattr(hf_config, "max_position_embeddings", None)
    if positions and cfg.positional_embedding_type == "rotary":
        cfg.n_ctx = positions  # 3.9 sets 2048 for some families, regardless of the checkpoint


def _check_rope(cfg: Any, hf_config: Any) -> None:
    """Raise if the 3.9 translation drops a scaling of the rotary frequencies.

    Scaling that starts beyond some length (dynamic NTK, longrope) is not visible on short text.
    """
    rope = getattr(hf_config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    carried = {
        "default": True,
        "llama3": getattr(cfg, "use_NTK_by_parts_rope", False),
        "yarn": getattr(cfg, "use_yarn_rope", False),
        "linear": getattr(cfg, "rotary_scaling_factor", 1.0) == rope.get("factor"),
        "dynamic": getattr(cfg, "use_dynamic_ntk_rope", False),
    }
    nested = any(isinstance(value, dict) for value in rope.values())  # one per kind of layer
    if not nested and not carried.get(kind, False):
        raise UnsupportedModelError(f"its rotary scaling rope_type={kind!r} would be lost")


@torch.no_grad()  # not inference_mode: tensors cached here may take part in training later
def _few_logits(model: Any, vocabulary: int, context: int) -> Float[torch.Tensor, "1 pos vocab"]:
    """Logits of a few fixed tokens, of a TransformerLens or a Hugging Face model."""
    generator = torch.Generator().manual_seed(0)
    length = min(CHECK_TOKENS, context)
    tokens = torch.randint(0, vocabulary, (1, length), generator=generator)
    with evaluating(model):
        output = model(tokens.to(model_device(model)))
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits.cpu()


def _check_same_logits(
    got: Float[torch.Tensor, "1 pos vocab"],
    wanted: Float[torch.Tensor, "1 pos vocab"],
    name: str,
    kind: str,
) -> None:
    tolerance = CHECK_TOLERANCE.get(wanted.dtype)
    if tolerance is None:
        return
    difference = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"model {name!r}: logits of the {kind} differ from Hugging Face's by "
            f"{difference:.1e} of the largest one; expected at most {tolerance:.0e}"
        )


def _attach_tokenizer(model: Any, tokenizer: Any | None) -> None:
    """Give the model its tokenizer, with the checkpoint's own beginning-of-sequence default.

    TransformerLens' own loaders turn that token on for every tokenizer. To do so, they load the
    tokenizer again by name, which fails for a tokenizer without a folder. Here
    ``cfg.tokenizer_prepends_bos`` records the tokenizer's own behaviour, so
    ``to_tokens(..., prepend_bos=…)`` still works as documented.
    """
    if tokenizer is None:
        return
    from transformer_lens.model_bridge.sources import detect_tokenizer_bos_eos

    prepends, appends = detect_tokenizer_bos_eos(tokenizer)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = "<|endoftext|>"
    for missing in ("pad_token", "bos_token"):
        if getattr(tokenizer, missing) is None:
            setattr(tokenizer, missing, tokenizer.eos_token)
    # With left padding, TransformerLens masks every token that equals the padding token.
    tokenizer.padding_side = "right"
    model.tokenizer = tokenizer
    model.cfg.tokenizer_prepends_bos = prepends
    model.cfg.tokenizer_appends_eos = appends
