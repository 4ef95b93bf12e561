"""Compare a bridge with the model it wraps: some models are wrapped incorrectly."""

from __future__ import annotations

from typing import Any

import torch

from gainlens.errors import UnsupportedModelError
from gainlens.model.attention_layouts import (
    LAYOUTS,
    bridge_weights,
    layer_tensors,
    plain_tensors,
)
from gainlens.model.fast_copy import twin
from gainlens.model.running import evaluating, is_exact, model_device

N_TOKENS = 12
TOLERANCE = 1e-3
"""Maximum difference of the logits, relative to their largest value."""


@torch.no_grad()
def check_against_original(model: Any, name: str) -> None:
    """Compare the logits of a bridge and of the transformers model with the same weights.

    The check is skipped if no comparison is possible: a HookedTransformer, folded weights,
    adapters, half precision, or user hooks on the model.

    Args:
        model: a TransformerBridge or HookedTransformer.
        name: its architecture.

    Raises:
        UnsupportedModelError: the logits differ.
    """
    original = getattr(model, "original_model", None)
    folded = getattr(model, "compatibility_mode", False)
    if original is None or folded or not is_exact(model) or _hooked(model):
        return
    try:
        plain = twin(original, "eager")
        if plain is None:
            return
        generator = torch.Generator().manual_seed(0)
        length = min(N_TOKENS, int(getattr(model.cfg, "n_ctx", None) or N_TOKENS))
        tokens = torch.randint(0, int(model.cfg.d_vocab), (1, length), generator=generator)
        tokens = tokens.to(model_device(model))
        wanted = plain(input_ids=tokens, use_cache=False).logits
    except Exception:  # a family that can't be built from its configuration alone
        return
    with evaluating(model):
        got = model(tokens, return_type="logits")
    difference = _difference(got, wanted)
    if difference > TOLERANCE and _trained_parts(model, plain, name):
        difference = _difference(got, plain(input_ids=tokens, use_cache=False).logits)
    if not difference <= TOLERANCE:
        raise UnsupportedModelError(
            f"{name}: the bridge's logits differ from those of the transformers model of the same "
            f"weights by {difference:.1e} of the largest one (expected at most {TOLERANCE:.0e}): "
            "TransformerLens does not wrap this model correctly"
        )


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))


def _trained_parts(bridge: Any, plain: Any, name: str) -> bool:
    try:
        return _put_parts(bridge, plain, name)
    except (KeyError, RuntimeError, UnsupportedModelError):  # wrong sizes: the split is wrong
        return False


def _put_parts(bridge: Any, plain: Any, name: str) -> bool:
    """Rebuild joint matrices in ``plain`` from the bridge's parts; True if the parts were trained.

    Parts that hold the same values as the matrix in another order were split wrongly, not trained.
    """
    layout = LAYOUTS.get(name)
    if layout is None or not layout.joint:
        return False
    trained = False
    tensors = plain_tensors(bridge.original_model)
    for layer in range(int(plain.config.num_hidden_layers)):
        own = layer_tensors(tensors, layout, layer)
        kept = {n: t for n, t in own.items() if n.split(".")[0] in (*layout.parts, layout.output)}
        weights = bridge_weights(bridge, layout, plain.config, layer, tensors)
        matrix = own[f"{layout.parts[0]}.weight"]
        parts = torch.cat([x.flatten() for x in (weights.q, weights.k, weights.v)])
        trained |= not torch.equal(parts.sort().values, matrix.flatten().sort().values)
        module = plain.get_submodule(layout.attention.format(layer))
        for path, tensor in layout.write(kept, weights, plain.config).items():
            owner, _, leaf = path.rpartition(".")
            module.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(tensor, False)
    return trained


def _hooked(model: Any) -> bool:
    points = (m for m in model.modules() if hasattr(m, "fwd_hooks"))
    inner = (m for m in model.original_model.modules() if hasattr(m, "fwd_hooks"))
    return any(point.fwd_hooks for part in (points, inner) for point in part)
