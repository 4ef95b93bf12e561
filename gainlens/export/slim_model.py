"""``slim``: a physically smaller model that computes what the masked original computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int

from gainlens.ablation.refit_cut import RefitCut
from gainlens.data.batches import Tokens, batches
from gainlens.errors import FileFormatError, InputError, UnsupportedModelError
from gainlens.export.building import parameters_on_meta, put
from gainlens.export.canonical import canonical_maps, check_no_rotation, to_canonical
from gainlens.export.modeling import (
    CLASSES,
    family_of,
    plan_of,
    plan_rotary_dim,
    slim_config,
)
from gainlens.export.plan import SlicePlan
from gainlens.export.sources import Source, open_source
from gainlens.export.sources.base import Cut
from gainlens.export.values import ValuePath, value_paths
from gainlens.model.wrapping import first_line

CHECK_POSITIONS = 12
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest logit difference from the masked original, times the largest logit where above 1."""


@dataclass(frozen=True, eq=False)
class Parity:
    """What the masked original says on a few tokens; kept with a slim model for later checks.

    Attributes:
        tokens: ``[2, pos]`` arbitrary token ids.
        logits: of the original after the same cut, float32 (float64 of a float64 model).
        difference: the slim model's largest difference from them.
    """

    tokens: Int[torch.Tensor, "document pos"]
    logits: Float[torch.Tensor, "document pos vocab"]
    difference: float


def slim(
    model: Any, plan: Any, tokens: Tokens | None = None, *, refit: RefitCut | None = None
) -> Any:
    """A transformers model with thin keys that computes what the masked original computes.

    Rows of the query and key projections that the plan cuts are gone, and with them their share
    of the key cache; the softmax scale stays that of the full head. Where a norm sits on the keys
    (Qwen3, Gemma3) its statistic needs the full width: there the projections stay whole and only
    the cached and attended key is thin. With ``plan.value_widths`` the value path is cut as
    well, by the best low-rank pair for the calibration text.

    Args:
        model: a TransformerBridge, a HookedTransformer or a transformers model; left as it was.
        plan: a ``SlicePlan`` for this model: which units stay; or a ``RefitCut`` (from
            ``gainlens.refit``) in the place of both a plan of its mask and ``refit``.
        tokens: calibration text, needed for value widths alone; ``[document, position]`` or
            documents.
        refit: linear maps of the kept query and key dimensions, folded into their projections;
            its mask must be the plan's.

    Returns:
        A ``PreTrainedModel`` in eval mode on the model's device and in its dtype, of a
        ``gainlens_…`` model type, with ``generate`` and ``save_pretrained``; the plan is
        ``gainlens.export.plan_of(slim.config)``. Parameters share no memory with the original.

    Raises:
        InputError: a plan of another model or that splits a rotary pair; value widths without
            tokens; a refit of another mask or model.
        UnsupportedModelError: a family or option that can't be made slim, with the reason; or
            logits that differ from the masked original's.
    """
    if isinstance(plan, RefitCut) and refit is None:
        plan, refit = SlicePlan.from_mask(plan.mask), plan
    if not isinstance(plan, SlicePlan):
        raise InputError(
            f"plan={type(plan).__name__}: expected a SlicePlan (SlicePlan.from_mask makes one) "
            "or a RefitCut"
        )
    source = open_source(model)
    if refit is not None:
        check_refit(refit, plan, source)
        plan = replace(plan, facts={**plan.facts, "refit": refit.facts})
    plan.check_model(source.shape, source.fingerprint, source.architecture)
    if plan.basis == "canonical":
        check_no_rotation(source)
    plan = replace(plan, fingerprint=source.fingerprint)
    rotary_dim = plan_rotary_dim(source.family, source.config, plan)
    layouts = plan.layouts(rotary_dim)
    cut = _cut(source, plan, refit)
    paths = _paths(source, plan, cut, tokens)

    biases = biases_of(source, plan)
    config = slim_config(source.config, source.family, plan, biases)
    config.dtype = source.dtype
    with parameters_on_meta():
        thin: Any = CLASSES[source.family.name][1](config)
    attention = [f"{source.family.attention.format(n)}." for n in range(source.n_layers)]
    for layer, prefix in enumerate(attention):
        weights = source.attention(layer)
        if plan.basis == "canonical":
            weights, _ = to_canonical(weights)
        if refit is not None:
            weights = weights.mapped(refit.query_maps[layer], refit.key_maps[layer])
        path = paths[layer]
        if path is not None:
            device = weights.v.device
            weights = weights.thin_values(path.down.to(device), path.up.to(device))
        for name, tensor in weights.thin_keys(layouts[layer]).projections().items():
            if name.endswith("_norm"):
                tensor = tensor - source.family.norm_offset
            put(thin, prefix + name, tensor.to(source.dtype))
    tied = set(thin.all_tied_weights_keys) if config.tie_word_embeddings else set()
    wanted = [
        name
        for name, _ in thin.named_parameters(remove_duplicate=False)
        if not name.startswith(tuple(attention)) and name not in tied
    ]
    for name, tensor in source.others(wanted):
        put(thin, name, tensor.to(source.dtype).clone(memory_format=torch.contiguous_format))
    thin.tie_weights()
    left = [name for name, p in thin.named_parameters() if p.is_meta]
    if left:
        raise UnsupportedModelError(f"{source.architecture}: nothing was found for {left[0]!r}")
    thin = thin.to(source.device).eval()
    generation = getattr(getattr(model, "original_model", model), "generation_config", None)
    if generation is not None:
        thin.generation_config = type(generation).from_dict(generation.to_dict())
    tokenizer = getattr(model, "tokenizer", None)
    thin.gainlens_tokenizer = tokenizer if hasattr(tokenizer, "save_pretrained") else None
    thin.gainlens_parity = _check(source, thin, cut, paths)
    return thin


def load_slim(folder: str | Path, **kwargs: Any) -> Any:
    """Read what a slim model's ``save_pretrained`` or ``export_model(…, "gainlens")`` wrote.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.
        kwargs: go to ``from_pretrained`` (``dtype``, ``device_map``, …).

    Raises:
        InputError: there is no such folder.
        FileFormatError: it is no slim checkpoint, or is damaged.
    """
    from transformers import AutoConfig

    if not Path(folder).is_dir():
        raise InputError(f"folder {str(folder)!r} does not exist")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _, model_class = CLASSES[family_of(config).name]
        settings = {**kwargs, "trust_remote_code": False, "output_loading_info": True}
        model, info = model_class.from_pretrained(folder, **settings)
    except Exception as error:
        raise FileFormatError(
            f"{folder} can't be read as a slim model: {first_line(error)}"
        ) from None
    if missing := sorted(info["missing_keys"]):
        raise FileFormatError(f"{folder} lacks {len(missing)} weights, the first is {missing[0]!r}")
    return model.eval()


def check_tolerance(
    got: Float[torch.Tensor, "..."], wanted: Float[torch.Tensor, "..."], dtype: torch.dtype
) -> tuple[float, float]:
    """Largest difference, and what is allowed for ``dtype``."""
    difference = float((got - wanted).abs().max())
    return difference, TOLERANCE.get(dtype, 1e-1) * max(1.0, float(wanted.abs().max()))


def check_refit(refit: RefitCut, plan: SlicePlan, source: Source) -> None:
    """Raise ``InputError`` unless the maps belong to this plan and this model."""
    n_heads = int(source.config.num_attention_heads)
    expected = (source.n_layers, n_heads, source.shape[2], source.shape[2])
    if tuple(refit.query_maps.shape) != expected:
        raise InputError(
            f"refit has query maps {tuple(refit.query_maps.shape)}: {source.architecture} takes "
            f"{expected}"
        )
    if plan.basis != "own" or not torch.equal(refit.mask.keep, plan.keep):
        raise InputError(
            "refit keeps other dimensions than plan: expected SlicePlan.from_mask(refit.mask)"
        )
    fitted = refit.facts.get("fingerprint")
    if fitted is not None and fitted != source.fingerprint:
        raise InputError(
            f"refit was fitted to another model (weights {fitted[:12]}): this "
            f"{source.architecture} has weights {source.fingerprint[:12]}"
        )
    if source.family.norm:
        raise UnsupportedModelError(
            f"{source.architecture} has a norm between its projections and the rotation, and a "
            "refit's maps come after it, so they fold into no weight: pass the plan alone"
        )


def _cut(source: Source, plan: SlicePlan, refit: RefitCut | None) -> Cut:
    if plan.basis == "canonical":
        return Cut(canonical_maps(source, plan))
    if refit is None:
        return Cut(torch.diag_embed(plan.keep.double()))
    return Cut(refit.key_maps.double().transpose(2, 3), refit.query_maps.double().transpose(2, 3))


def _paths(
    source: Source, plan: SlicePlan, cut: Cut, tokens: Tokens | None
) -> list[ValuePath | None]:
    full = (source.shape[2],) * source.n_layers
    if plan.value_widths is None or plan.value_widths == full:
        return [None] * source.n_layers
    if tokens is None:
        raise InputError(
            f"plan cuts values to {min(plan.value_widths)} dimensions: expected tokens, for the "
            "best cut depends on what flows through (a cut by weights alone ruins a model)"
        )
    vocabulary = int(source.config.vocab_size)
    flows = source.flows(list(batches(tokens, vocabulary)), cut)
    if not bool(torch.isfinite(flows).all()):
        raise InputError("model: its attention outputs are not finite on these tokens")
    return value_paths(source, plan.value_widths, flows)


def biases_of(source: Source, plan: SlicePlan) -> str:
    """Which of ``q``, ``k``, ``v``, ``o`` have a bias in the slim model, a letter each."""
    first = source.attention(0)
    found = "".join(n for n in "qkvo" if getattr(first, f"{n}_bias") is not None)
    if plan.basis == "canonical":
        found = "qk" + found.replace("q", "").replace("k", "")
    return found


def _check(source: Source, thin: Any, cut: Cut, paths: list[ValuePath | None]) -> Parity:
    """Run a few tokens through both.

    Raises:
        InputError: weights that are not finite.
        UnsupportedModelError: the logits differ.
    """
    vocabulary = int(source.config.vocab_size)
    length = min(CHECK_POSITIONS, int(getattr(source.config, "max_position_embeddings", 12)))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (2, length), generator=generator)
    values = None
    if any(path is not None for path in paths):
        eye = torch.eye(source.shape[2], dtype=torch.float64).expand(source.shape[1], -1, -1)
        values = torch.stack([eye if path is None else path.projection for path in paths])
    wanted = source.logits(tokens, cut, values)
    if not bool(torch.isfinite(wanted).all()):
        raise InputError(
            f"model: the masked {source.architecture} gives logits that are NaN or infinite; "
            "expected finite weights"
        )
    with torch.no_grad():
        got = thin(tokens.to(source.device), use_cache=False).logits.cpu().to(wanted.dtype)
    difference, allowed = check_tolerance(got, wanted, source.dtype)
    if not difference <= allowed:
        raise UnsupportedModelError(
            f"{source.architecture}: the slim model's logits differ from the masked original's "
            f"by {difference:.1e}, expected at most {allowed:.1e}: this model does something "
            "that gainlens doesn't know, most likely to its attention"
        )
    return Parity(tokens, wanted, difference)


__all__ = ["Parity", "load_slim", "plan_of", "slim"]
