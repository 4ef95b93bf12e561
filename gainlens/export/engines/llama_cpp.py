"""A GGUF file for llama.cpp: architecture llama, one ``rope_freqs`` tensor, no code of gainlens.

llama.cpp rotates neighbouring rows, so query and key rows are interleaved, and it divides each
frequency by ``rope_freqs``. Its own converter would drop the longrope factors of a checkpoint
without a word, so the file is written here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gainlens.errors import InputError
from gainlens.export.engines.base import Engine
from gainlens.export.engines.stock import check_stock, longrope_factors, query_fold, stock_llama

FILE = "model.gguf"
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GLOBAL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


class LlamaCppEngine(Engine):
    """llama.cpp; ``tokenizer`` is a GGUF file whose vocabulary is copied (it serves none without).

    Its CUDA flash attention takes heads of 40, 64, 72, 80, 96, 112, 128 and 256 dimensions; other
    widths run without it.
    """

    name = "llama.cpp"
    precisions = ("f32", "f16", "q8_0")

    def check(self, slim: Any) -> None:
        """Raise ``EngineLimitError`` unless the model fits llama.cpp's Llama."""
        check_stock(slim, self.name, None, silu_only=True)
        _gguf()

    def check_tokenizer(self, tokenizer: Any | None, vocabulary: int) -> None:
        """Raise ``InputError`` unless it is a GGUF file of as many tokens, or None."""
        if tokenizer is None:
            return
        found = [v for name, v, *_ in _vocabulary(tokenizer) if name == "tokenizer.ggml.tokens"]
        if len(found) != 1:
            raise InputError(f"tokenizer={str(tokenizer)!r} is a GGUF file without a vocabulary")
        if len(found[0]) != vocabulary:
            raise InputError(
                f"tokenizer={str(tokenizer)!r} has {len(found[0])} tokens, the model {vocabulary}"
            )

    def write(self, slim: Any, folder: Path, precision: str, tokenizer: Any | None) -> None:
        """``model.gguf``."""
        gguf = _gguf()
        stock = stock_llama(slim)
        theta, factors = longrope_factors(slim)
        writer = gguf.GGUFWriter(str(folder / FILE), "llama")
        try:
            _add_settings(writer, stock.config, theta, precision, gguf)
            if tokenizer is None:
                writer.add_tokenizer_model("none")  # token ids alone
            else:
                for name, value, kind, inner in _vocabulary(tokenizer):
                    writer.add_key_value(name, value, kind, sub_type=inner)
            writer.add_tensor("rope_freqs.weight", np.asarray(factors, dtype=np.float32))
            for name, tensor in stock.state_dict().items():
                if name == "lm_head.weight" and stock.config.tie_word_embeddings:
                    continue
                _add_weight(writer, name, tensor.numpy(), stock.config, precision, gguf)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    def round(self, tensor: torch.Tensor, precision: str) -> torch.Tensor:
        """Through the quantiser and back; rows are what is quantised, whatever their order."""
        if tensor.ndim == 1:
            return tensor
        gguf = _gguf()
        kind = _stored_as(precision, tuple(tensor.shape), gguf)
        stored = gguf.quants.quantize(np.ascontiguousarray(tensor.numpy()), kind)
        return torch.from_numpy(gguf.quants.dequantize(stored, kind).astype(np.float32))

    def query_fold(self, slim: Any) -> float:
        """The softmax scale of the full head."""
        return query_fold(slim)

    def read_back(self, folder: Path) -> Any:
        """Through gguf's reader into a transformers Llama whose frequencies come from the file."""
        return llama_from_gguf(folder / FILE)


def llama_from_gguf(file: Path) -> Any:
    """A float32 ``LlamaForCausalLM`` from a GGUF file of architecture llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    gguf = _gguf()
    reader = gguf.GGUFReader(str(file))

    def setting(name: str) -> Any:
        return reader.get_field(f"llama.{name}").contents()

    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    heads, kv_heads = int(setting("attention.head_count")), int(setting("attention.head_count_kv"))
    theta, width = float(setting("rope.freq_base")), int(setting("rope.dimension_count"))
    config = LlamaConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=int(setting("embedding_length")),
        intermediate_size=int(setting("feed_forward_length")),
        num_hidden_layers=int(setting("block_count")),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=int(setting("attention.key_length")),
        max_position_embeddings=int(setting("context_length")),
        rms_norm_eps=float(setting("attention.layer_norm_rms_epsilon")),
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        tie_word_embeddings="output.weight" not in tensors,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    model = LlamaForCausalLM(config).eval()
    state = {}
    for name in model.state_dict():
        theirs = _gguf_name(name)
        if theirs not in tensors:
            theirs = "token_embd.weight"  # a tied output
        array = np.asarray(tensors[theirs], dtype=np.float32)
        if theirs.split(".")[-2] in ("attn_q", "attn_k"):
            n = heads if theirs.split(".")[-2] == "attn_q" else kv_heads
            array = array.reshape(n, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        state[name] = torch.from_numpy(array.copy())
    model.load_state_dict(state, strict=True)
    plain = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    factors = tensors["rope_freqs.weight"].astype(np.float64)
    model.model.rotary_emb.inv_freq = torch.from_numpy((plain / factors).astype(np.float32))
    return model


def _add_settings(writer: Any, config: Any, theta: float, precision: str, gguf: Any) -> None:
    width = int(config.head_dim)
    writer.add_name("gainlens slim model")
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(int(config.num_attention_heads))
    writer.add_head_count_kv(int(config.num_key_value_heads))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(theta)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(int(config.vocab_size))
    kinds = gguf.LlamaFileType
    writer.add_file_type(
        {"f32": kinds.ALL_F32, "f16": kinds.MOSTLY_F16, "q8_0": kinds.MOSTLY_Q8_0}[precision]
    )


def _vocabulary(source: Any) -> list[tuple[str, Any, Any, Any]]:
    """Name, value, type and inner type of each of the tokenizer's entries in a GGUF file."""
    gguf = _gguf()
    path = Path(str(source))
    expected = (
        "for llama.cpp expected a GGUF file of the original model, whose vocabulary is copied (or "
        "None, for token ids alone)"
    )
    if not path.is_file():
        raise InputError(f"tokenizer={str(source)!r}: {expected}")
    try:
        fields = gguf.GGUFReader(str(path)).fields
    except Exception as error:  # of any type, for a file that is damaged or something else
        raise InputError(
            f"tokenizer={str(source)!r} can't be read ({error}): {expected}"
        ) from error
    found = []
    for name, entry in fields.items():
        if name.startswith("tokenizer."):
            kind = entry.types[0]
            inner = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            found.append((name, entry.contents(), kind, inner))
    return found


def _add_weight(
    writer: Any,
    name: str,
    array: npt.NDArray[np.float32],
    config: Any,
    precision: str,
    gguf: Any,
) -> None:
    theirs = _gguf_name(name)
    part = theirs.split(".")[-2]
    if part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    array = np.ascontiguousarray(array)
    kind = _stored_as(precision, array.shape, gguf)
    writer.add_tensor(theirs, gguf.quants.quantize(array, kind), raw_dtype=kind)


def _stored_as(precision: str, shape: tuple[int, ...], gguf: Any) -> Any:
    """Vectors stay in float32, and rows that no block of 32 divides in float16."""
    kinds = gguf.GGMLQuantizationType
    if precision == "f32" or len(shape) == 1:
        return kinds.F32
    return kinds.F16 if precision == "f16" or shape[-1] % 32 else kinds.Q8_0


def _gguf_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` is ``blk.3.ffn_up.weight``."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    _, _, layer, *middle, leaf = name.split(".")
    return f"blk.{layer}.{LAYER_NAMES['.'.join(middle)]}.{leaf}"


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise InputError("engine='llama.cpp' writes GGUF and needs: pip install gguf") from error
    return gguf
