"""The hash that says which model a result belongs to."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from gainlens.errors import UnsupportedModelError
from gainlens.model.text_config import text_config


@torch.no_grad()
def model_fingerprint(model: Any) -> str:
    """SHA-256, in hexadecimal, of a model's attention weights and the signs of its embedding.

    The same for a ``TransformerBridge``, a ``HookedTransformer`` and the Hugging Face model of
    one checkpoint, in one floating point type. Folded weights (compatibility mode) give another
    one, since gains of a folded model belong to other weights. Of the embedding only signs
    count: TransformerLens multiplies Gemma's by sqrt(d_model).

    Args:
        model: any of the three kinds, on any device.

    Raises:
        UnsupportedModelError: the attention weights are kept in a form that is not known here.
    """
    digest = hashlib.sha256()
    embedding, layers = _weights(model)
    digest.update(f"embedding {tuple(embedding.shape)}".encode())
    digest.update(np.packbits((embedding > 0).cpu().numpy()).tobytes())
    for number, layer in enumerate(layers):
        for name, weight in layer.items():
            plain = weight.detach().to("cpu", torch.float32).contiguous()
            digest.update(f"{number} {name} {tuple(plain.shape)}".encode())
            digest.update(plain.numpy().data)
    return digest.hexdigest()


Matrices = dict[str, Float[torch.Tensor, "_ _"]]
"""q, k, v: ``[head * d_head, d_model]``; o: ``[d_model, head * d_head]``."""


def _weights(model: Any) -> tuple[Float[torch.Tensor, "vocab d_model"], list[Matrices]]:
    if hasattr(model, "blocks") and hasattr(model, "hook_dict"):
        layers = [_transformer_lens(block.attn) for block in model.blocks]
        return _embedding(model), layers
    if hasattr(model, "get_input_embeddings"):
        config = text_config(model.config)
        heads = int(config.num_attention_heads)
        found = [
            matrices
            for module in model.modules()
            if (matrices := _hugging_face(module, heads, config)) is not None
        ]
        if found:
            return model.get_input_embeddings().weight, found
    raise UnsupportedModelError(
        f"model of type {type(model).__name__} keeps its attention weights in a form that "
        "has no fingerprint"
    )


def _embedding(model: Any) -> Float[torch.Tensor, "vocab d_model"]:
    original = getattr(model, "original_model", None)
    weight: torch.Tensor = model.W_E if original is None else model.embed.weight
    return weight


def _transformer_lens(attention: Any) -> Matrices:
    """From ``[head, d_model, d_head]`` (o: ``[head, d_head, d_model]``), key heads not repeated."""

    def rows(name: str) -> Float[torch.Tensor, "out in"]:
        grouped = getattr(attention, f"_W_{name}", None)  # HookedTransformer's own, ungrouped
        weight: torch.Tensor = getattr(attention, f"W_{name}") if grouped is None else grouped
        return weight.transpose(1, 2).reshape(-1, weight.shape[1])

    out = attention.W_O
    return {
        "q": rows("Q"),
        "k": rows("K"),
        "v": rows("V"),
        "o": out.reshape(-1, out.shape[-1]).T,
    }


def _hugging_face(module: Any, heads: int, config: Any) -> Matrices | None:
    """The matrices of an attention module, or None where ``module`` is not one."""
    if all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj")):
        out = getattr(module, "o_proj", None) or getattr(module, "out_proj", None)
        out = out if out is not None else getattr(module, "dense", None)
        if out is None:
            return None
        q, k, v = (getattr(module, name).weight for name in ("q_proj", "k_proj", "v_proj"))
        return {"q": q, "k": k, "v": v, "o": out.weight}
    # NeoX and BLOOM keep q, k and v of a head together; Falcon's layout is another.
    fused_by_head = getattr(config, "model_type", "") in ("gpt_neox", "bloom")
    if fused_by_head and hasattr(module, "query_key_value") and hasattr(module, "dense"):
        fused = module.query_key_value.weight
        q, k, v = fused.reshape(heads, 3, -1, fused.shape[1]).unbind(1)
        flat = [part.reshape(-1, fused.shape[1]) for part in (q, k, v)]
        return {"q": flat[0], "k": flat[1], "v": flat[2], "o": module.dense.weight}
    if hasattr(module, "c_attn") and hasattr(module, "c_proj"):  # GPT-2 stores [in, out]
        q, k, v = module.c_attn.weight.T.chunk(3)
        return {"q": q, "k": k, "v": v, "o": module.c_proj.weight.T}
    if hasattr(module, "qkv_proj") and hasattr(module, "o_proj"):  # Phi-3
        fused = module.qkv_proj.weight
        groups = heads // int(config.num_key_value_heads)
        key_rows = fused.shape[0] // (groups + 2)
        q, k, v = fused.split([groups * key_rows, key_rows, key_rows])
        return {"q": q, "k": k, "v": v, "o": module.o_proj.weight}
    return None
