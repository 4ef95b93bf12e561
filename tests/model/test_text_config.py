"""Configurations that keep the language model's settings one level down."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
import torch
import transformers

from gainlens.errors import UnsupportedModelError
from gainlens.export import SlicePlan, slim
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.text_config import text_config

pytestmark = pytest.mark.one_env
SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def test_where_a_vocabulary_is():
    text = transformers.LlamaConfig(**SMALL)
    assert text_config(text) is text
    whole = transformers.LlavaConfig(text_config=text)
    assert not hasattr(whole, "vocab_size") or whole.vocab_size != 96
    assert text_config(whole).vocab_size == 96
    assert text_config(whole).num_attention_heads == 4
    plain = SimpleNamespace(vocab_size=3)
    assert text_config(plain) is plain


def test_a_multimodal_model_has_a_fingerprint_and_is_refused_by_name():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SMALL), vision_config=vision, image_token_index=95
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    before = model_fingerprint(model)
    assert len(before) == len(hashlib.sha256().hexdigest())
    with torch.no_grad():
        model.model.language_model.layers[1].self_attn.k_proj.weight[0] += 1
    assert model_fingerprint(model) != before
    with pytest.raises(UnsupportedModelError, match="LlavaForConditionalGeneration can't be made"):
        slim(model, SlicePlan(torch.ones(2, 2, 8, dtype=torch.bool)))
