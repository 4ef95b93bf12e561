"""HookedTransformer and bridge agree on gains and cuts, also where only one fires hook_rot_k.

On GPT-NeoX, GPT-J and Phi-3 the bridge is silent after the rotation and gainlens turns the keys
itself, while HookedTransformer fires there: each is the other's oracle. Runs where a release has
both classes.
"""

from __future__ import annotations

import pytest
import torch
from families import bridge, family_tokens, hugging_face
from releases import HAS_HOOKED

import gainlens as gl

CONVERTIBLE = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    "GPTNeoXForCausalLM",
    "GPTJForCausalLM",
    "GPT2LMHeadModel",
    "OPTForCausalLM",
)


@pytest.mark.parametrize("name", CONVERTIBLE if HAS_HOOKED else ())
@pytest.mark.parametrize("unit", ["pair", "dim"])
def test_classes_agree(name, unit):
    from gainlens.model.wrapping import to_hooked

    hooked, bridged, tokens = (
        to_hooked(hugging_face(name), name, None),
        bridge(name),
        family_tokens(),
    )
    gains = gl.probe_gains(hooked, tokens, progress=False)
    other = gl.probe_gains(bridged, tokens, progress=False)
    for score in ("rms", "std", "qk"):
        for stage in ("projected", "rotated"):
            assert torch.allclose(gains.score(score, stage), other.score(score, stage), rtol=1e-4)
    mask = gl.KeyMask.quietest(gains, 0.5, unit=unit, scope="layer")
    with torch.inference_mode():
        a, b = (
            model.run_with_hooks(tokens, fwd_hooks=gl.ablation_hooks(model, mask))
            for model in (hooked, bridged)
        )
        intact = hooked(tokens)
    # HookedTransformer centres no logits here, so they compare directly.
    assert torch.allclose(a, b, atol=1e-4)
    assert (a - intact).abs().max() > 1e-3
