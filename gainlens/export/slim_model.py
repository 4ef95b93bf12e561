"""``slim``: a physically smaller model that computes what the masked original computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int

from gainlens.ablation.cut import Cut
from gainlens.brief import brief
from gainlens.data.batches import Tokens, batches
from gainlens.errors import FileFormatError, InputError, UnsupportedModelError
from gainlens.export.after_norm import maps_follow
from gainlens.export.building import put, without_weights
from gainlens.export.canonical import canonical_maps, check_no_rotation, to_canonical
from gainlens.export.layout import KeyPairs
from gainlens.export.modeling import (
    CLASSES,
    family_of,
    plan_of,
    plan_pairs,
    slim_config,
)
from gainlens.export.plan import SlicePlan, as_plan
from gainlens.export.plan_files import CUT_FILE
from gainlens.export.slim_attention import SlimAttention, rope_rows
from gainlens.export.sources import Source, open_source
from gainlens.export.sources.base import ProjectionMaps
from gainlens.export.streaming import MadeWeights, OneLayer, stream
from gainlens.export.values import ValuePath, value_paths
from gainlens.files import check_sums
from gainlens.model.config_limits import check_config
from gainlens.model.context import context_of
from gainlens.model.stored_weights import StoredWeights, is_offloaded
from gainlens.model.wrapping import first_line

CHECK_POSITIONS = 12
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest logit difference from the masked original, times the largest logit where above 1."""


@dataclass(frozen=True, eq=False)
class Parity:
    """Logits of the masked original on a few tokens, kept with a slim model for later checks.

    Attributes:
        tokens: ``[2, pos]`` arbitrary token ids.
        logits: logits of the original after the same cut, float32 (float64 for a float64 model).
        difference: largest difference of the slim model from them.
    """

    tokens: Int[torch.Tensor, "document pos"]
    logits: Float[torch.Tensor, "document pos vocab"]
    difference: float

    __repr__ = brief


def slim(model: Any, plan: SlicePlan | Cut, tokens: Tokens | None = None) -> Any:
    """A transformers model with thin keys that computes what the masked original computes.

    The cut rows of the query and key projections are removed, and with them their share of the key
    cache. The softmax scale stays that of the full head. If a norm acts on the keys (Qwen3, Gemma3,
    OLMo2), its statistic needs the full width: there the projections stay whole, and only the
    cached and attended key is thin. The maps of a cut fold into the projections; behind a norm they
    can't, and each head keeps a small matrix ``[kept, d_head]`` that acts after the norm. With
    ``plan.value_widths`` the value path is cut as well, by the best low-rank approximation for the
    calibration text.

    Args:
        model: a TransformerBridge, a HookedTransformer or a transformers model; not changed.
        plan: a cut of this model (``KeyMask``, ``gainlens.best_cut``), or a ``SlicePlan``, which
            can also set the width of values.
        tokens: calibration text, needed only for value widths; ``[document, position]`` or
            documents.

    Returns:
        A ``PreTrainedModel`` in eval mode on the model's device and in its dtype, of a
        ``gainlens_…`` model type, with ``generate`` and ``save_pretrained``; the plan is
        ``gainlens.export.plan_of(slim.config)``. Parameters share no memory with the original. Of a
        model that was loaded with a ``device_map`` and has weights on disk, the slim one is not in
        memory either: each weight is made from the original's when it is used or written, so the
        original has to stay where it is.

    Raises:
        InputError: the plan is of another model or splits a rotary pair; value widths without
            tokens; the maps are of another model.
        UnsupportedModelError: this family or option cannot be made slim (the message gives the
            reason), or the logits differ from those of the masked original.

    Example:
        >>> slim = gl.slim(model, mask)
        >>> slim.config.model_type
        'gainlens_llama'
        >>> text = slim.generate(calibration[:1, :8], max_new_tokens=4, do_sample=False)
        >>> text.shape[1]
        12
    """
    plan = as_plan(plan)
    source = open_source(model)
    check_maps(plan, source)
    plan.check_model(source.shape, source.fingerprint, source.architecture)
    if plan.basis == "canonical":
        check_no_rotation(source)
    plan = replace(plan, fingerprint=source.fingerprint)
    layouts = plan.layouts(plan_pairs(source.family, source.config, plan))
    biases = biases_of(source, plan)
    config = slim_config(source.config, source.family, plan, biases)
    config.dtype = source.dtype
    thin = without_weights(lambda: CLASSES[source.family.name][1](config))
    cut = _maps_of(source, plan)
    behind = maps_follow(source.family, source.config, plan.maps)
    paths = plan_value_paths(source, plan, tokens, cut)
    attention = [f"{source.family.attention.format(n)}." for n in range(source.n_layers)]

    def thin_attention(layer: int) -> dict[str, torch.Tensor]:
        """The attention weights of a layer, by name."""
        weights = source.attention(layer)
        if plan.basis == "canonical":
            weights, _ = to_canonical(weights)
        if plan.maps is not None and not behind:
            weights = weights.mapped(plan.maps.queries[layer], plan.maps.keys[layer])
        path = paths[layer]
        if path is not None:
            device = weights.v.device
            weights = weights.thin_values(path.down.to(device), path.up.to(device))
        if plan.maps is not None and behind:
            maps = plan.maps.queries[layer], plan.maps.keys[layer]
            weights = weights.with_maps(*maps, layouts[layer])
        else:
            weights = weights.thin_keys(layouts[layer])
        offset = source.family.norm_offset
        return {
            attention[layer] + name: (t - offset if name.endswith("_norm") else t).to(source.dtype)
            for name, t in weights.projections().items()
        }

    tied = dict(thin.all_tied_weights_keys) if config.tie_word_embeddings else {}
    names = [name for name, _ in thin.named_parameters(remove_duplicate=False)]
    wanted = [n for n in names if not n.startswith(tuple(attention)) and n not in tied]
    if is_offloaded(model):
        made = OneLayer(
            attention,
            thin_attention,
            lambda name: dict(source.others([name]))[name].to(source.dtype).contiguous(),
            tied,
        )
        thin = stream(thin, MadeWeights(names, made), source.dtype, source.device)
    else:
        for layer in range(source.n_layers):
            for name, tensor in thin_attention(layer).items():
                put(thin, name, tensor)
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
    """Read a slim model written by ``save_pretrained`` or ``export_model(…, "gainlens")``.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.
        kwargs: go to ``from_pretrained`` (``dtype``, ``device_map``, …); ``device_map="disk"``
            leaves all weights in their files.

    Raises:
        InputError: there is no such folder.
        FileFormatError: it is no slim checkpoint, its weights are not finite or not its plan's, or
            a file is not what was written.

    Example:
        >>> folder = gl.export_model(gl.slim(model, mask), "slim")
        >>> slim = gl.load_slim(folder)
        >>> slim(calibration[:1]).logits.shape[-1]
        1024
    """
    from transformers import AutoConfig

    if not Path(folder).is_dir():
        raise InputError(f"folder {str(folder)!r} does not exist")
    check_config(folder)
    check_sums(folder)
    if kwargs.get("device_map") == "disk":
        kwargs["device_map"] = {"": "disk"}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        family, plan = family_of(config), plan_of(config)
        shape = (config.num_hidden_layers, family.n_kv_heads(config), family.d_head(config))
        if plan.shape != shape:
            raise InputError(f"its plan is of a model of shape {plan.shape}, its config of {shape}")
        model, info = CLASSES[family.name][1].from_pretrained(
            folder, output_loading_info=True, **kwargs
        )
    except Exception as error:
        raise FileFormatError(
            f"{folder} can't be read as a slim model: {first_line(error)}"
        ) from None
    if missing := sorted(info["missing_keys"]):
        raise FileFormatError(f"{folder} lacks {len(missing)} weights, the first is {missing[0]!r}")
    _check_weights(model, plan, plan_pairs(family, config, plan), folder)
    return model.eval()


def _check_weights(model: Any, plan: SlicePlan, pairs: KeyPairs, folder: str | Path) -> None:
    """Raise ``FileFormatError`` if weights are not finite or were cut by another plan."""
    weights = StoredWeights(model)
    for name, tensor in chain(weights.items(), model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FileFormatError(f"{folder}: weight {name!r} holds NaN or infinity")
    thin = [m for m in model.modules() if isinstance(m, SlimAttention)]
    layouts, _ = plan.turning(pairs)
    for layer, (module, layout) in enumerate(zip(thin, layouts, strict=True)):
        wanted = rope_rows(layout)
        stored = module.rope_index
        if (wanted is None) != (stored is None) or (
            wanted is not None and stored is not None and not torch.equal(stored.cpu(), wanted)
        ):
            raise FileFormatError(
                f"{folder}: the weights of layer {layer} keep other rotary pairs than its plan"
            )


def check_tolerance(
    got: Float[torch.Tensor, "..."], wanted: Float[torch.Tensor, "..."], dtype: torch.dtype
) -> tuple[float, float]:
    """Largest difference, and the tolerance for ``dtype``."""
    difference = float((got - wanted).abs().max())
    return difference, TOLERANCE.get(dtype, 1e-1) * max(1.0, float(wanted.abs().max()))


def check_maps(plan: SlicePlan, source: Source) -> None:
    """Raise ``InputError`` unless the maps of a plan, if it has any, fit this model.

    Raises:
        InputError: maps of another shape, in another basis, or missing.
        UnsupportedModelError: the projections are bounded before the maps.
    """
    if plan.maps is None and CUT_FILE in plan.facts:
        raise InputError(
            f"plan has lost its maps, which act after a norm: pass gainlens.load_cut of the "
            f"{plan.facts[CUT_FILE]} that lies beside its file"
        )
    if plan.maps is None and plan.frequencies is None:
        return
    if source.family.clip(source.config) is not None:
        raise UnsupportedModelError(
            f"{source.architecture} has {source.family.before_maps(source.config)} between its "
            "projections and the maps of a refitted cut, so they fold into no weight: pass its mask"
        )
    if plan.basis != "own":
        raise InputError("plan has maps in the canonical basis: expected basis='own'")
    if plan.maps is None:
        return
    n_heads = int(source.config.num_attention_heads)
    expected = (source.n_layers, n_heads, source.shape[2], source.shape[2])
    if tuple(plan.maps.queries.shape) != expected:
        raise InputError(
            f"plan has query maps {tuple(plan.maps.queries.shape)}: {source.architecture} takes "
            f"{expected}"
        )
    fitted = plan.maps.facts.get("fingerprint")
    if fitted is not None and fitted != source.fingerprint:
        raise InputError(
            f"the cut was fitted to another model (weights {fitted[:12]}): this "
            f"{source.architecture} has weights {source.fingerprint[:12]}"
        )


def _maps_of(source: Source, plan: SlicePlan) -> ProjectionMaps:
    if plan.basis == "canonical":
        return ProjectionMaps(canonical_maps(source, plan))
    keys = torch.diag_embed(plan.keep.double())
    if plan.maps is None and plan.frequencies is None:
        return ProjectionMaps(keys)
    if plan.maps is None:
        group = int(source.config.num_attention_heads) // keys.shape[1]
        queries = keys.repeat_interleave(group, 1)
    else:
        keys, queries = (m.double().transpose(2, 3) for m in (plan.maps.keys, plan.maps.queries))
    turns = None
    if plan.frequencies is not None:
        turns = plan.frequencies - source.rotary_frequencies()[:, None]
    return ProjectionMaps(keys, queries, turns, source.family.pairs(source.config).pairing)


def plan_value_paths(
    source: Source, plan: SlicePlan, tokens: Tokens | None, cut: ProjectionMaps | None = None
) -> list[ValuePath | None]:
    """The best thin value path of each layer for the text; None where values stay whole.

    Args:
        source: the model.
        plan: of this model.
        tokens: calibration text; needed where the plan cuts values.
        cut: what the plan does to queries and keys, if that is known already.

    Raises:
        InputError: no text for a plan that cuts values, or outputs that are not finite on it.
        UnsupportedModelError: a family that bounds each value.
    """
    full = (source.shape[2],) * source.n_layers
    if plan.value_widths is None or plan.value_widths == full:
        return [None] * source.n_layers
    if source.family.clip(source.config) is not None:
        raise UnsupportedModelError(
            f"{source.architecture} bounds each of its values, which holds in its own basis alone: "
            "expected a plan that leaves values alone (plan.with_values(None))"
        )
    if tokens is None:
        raise InputError(
            f"plan cuts values to {min(plan.value_widths)} dimensions: expected tokens, for the "
            "best cut depends on what flows through (a cut by weights alone ruins a model)"
        )
    vocabulary = int(source.config.vocab_size)
    flows = source.flows(list(batches(tokens, vocabulary)), cut or _maps_of(source, plan))
    if not bool(torch.isfinite(flows).all()):
        raise InputError("model: its attention outputs are not finite on these tokens")
    return value_paths(source, plan.value_widths, flows)


def biases_of(source: Source, plan: SlicePlan) -> str:
    """Letters of those of ``q``, ``k``, ``v``, ``o`` that have a bias in the slim model."""
    first = source.attention(0)
    found = "".join(n for n in "qkvo" if getattr(first, f"{n}_bias") is not None)
    if plan.basis == "canonical":
        found = "qk" + found.replace("q", "").replace("k", "")
    return found


def _check(source: Source, thin: Any, cut: ProjectionMaps, paths: list[ValuePath | None]) -> Parity:
    """Run a few tokens through both.

    Raises:
        InputError: weights that are not finite.
        UnsupportedModelError: the logits differ.
    """
    vocabulary = int(source.config.vocab_size)
    length = min(CHECK_POSITIONS, context_of(source) or CHECK_POSITIONS)
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
    # Slots turn by angles that the model computes in float32, whatever the type of its weights.
    dtype = source.dtype if cut.turns is None or source.dtype != torch.float64 else torch.float32
    difference, allowed = check_tolerance(got, wanted, dtype)
    if not difference <= allowed:
        raise UnsupportedModelError(
            f"{source.architecture}: the slim model's logits differ from the masked original's "
            f"by {difference:.1e}, expected at most {allowed:.1e}: this model does something "
            "that gainlens doesn't know, most likely to its attention"
        )
    return Parity(tokens, wanted, difference)


__all__ = ["Parity", "load_slim", "plan_of", "slim"]
