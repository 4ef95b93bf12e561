"""Reading and writing GGUF with gguf-py: names, precisions, vocabularies, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gainlens.errors import InputError

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


def add_common_settings(writer: Any, arch: str, config: Any, precision: str) -> None:
    """What every architecture is told; rotary widths and head sizes are each one's own.

    Args:
        writer: of gguf-py.
        arch: the name of the architecture, before its keys.
        config: of the slim model.
        precision: of the weights.
    """
    writer.add_name("gainlens slim model")
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(int(config.num_attention_heads))
    writer.add_head_count_kv(int(config.num_key_value_heads))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(int(config.vocab_size))
    kinds = gguf_package().LlamaFileType
    writer.add_file_type(
        {"f32": kinds.ALL_F32, "f16": kinds.MOSTLY_F16, "q8_0": kinds.MOSTLY_Q8_0}[precision]
    )


def add_vocabulary(writer: Any, source: Any | None) -> None:
    """The vocabulary of a GGUF file, or token ids alone."""
    if source is None:
        writer.add_tokenizer_model("none")
        return
    for name, value, kind, inner in vocabulary(source):
        writer.add_key_value(name, value, kind, sub_type=inner)


def add_weight(writer: Any, name: str, array: npt.NDArray[np.float32], precision: str) -> None:
    """One matrix or vector under its GGUF name."""
    gguf = gguf_package()
    array = np.ascontiguousarray(array)
    kind = stored_as(precision, array.shape, gguf)
    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)


def write_out(writer: Any) -> None:
    """Write everything that was added to the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()


class GgufFile:
    """A file as it is on disk: settings by name, weights in float32."""

    def __init__(self, file: Path) -> None:
        gguf = gguf_package()
        self._reader = gguf.GGUFReader(str(file))
        self.arch = str(self._reader.get_field("general.architecture").contents())
        self.weights: dict[str, npt.NDArray[np.float32]] = {
            t.name: np.asarray(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32)
            for t in self._reader.tensors
        }

    def setting(self, name: str) -> Any:
        """The architecture's setting ``name``."""
        return self._reader.get_field(f"{self.arch}.{name}").contents()

    def frequencies(self, rotary_width: int) -> npt.NDArray[np.float64]:
        """Angles per position: the base's own over ``rope_freqs``."""
        theta = float(self.setting("rope.freq_base"))
        plain = theta ** (-np.arange(0, rotary_width, 2, dtype=np.float64) / rotary_width)
        found: npt.NDArray[np.float64] = plain / self.weights["rope_freqs.weight"]
        return found

    def common_settings(self) -> dict[str, Any]:
        """Of a transformers ``LlamaConfig``, those that don't depend on the architecture."""
        return {
            "vocab_size": self.weights["token_embd.weight"].shape[0],
            "hidden_size": int(self.setting("embedding_length")),
            "intermediate_size": int(self.setting("feed_forward_length")),
            "num_attention_heads": int(self.setting("attention.head_count")),
            "num_key_value_heads": int(self.setting("attention.head_count_kv")),
            "max_position_embeddings": int(self.setting("context_length")),
            "rms_norm_eps": float(self.setting("attention.layer_norm_rms_epsilon")),
        }


def vocabulary(source: Any) -> list[tuple[str, Any, Any, Any]]:
    """Name, value, type and inner type of each of the tokenizer's entries in a GGUF file."""
    gguf = gguf_package()
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


def stored_as(precision: str, shape: tuple[int, ...], gguf: Any) -> Any:
    """Vectors stay in float32, and rows that no block of 32 divides in float16."""
    kinds = gguf.GGMLQuantizationType
    if precision == "f32" or len(shape) == 1:
        return kinds.F32
    return kinds.F16 if precision == "f16" or shape[-1] % 32 else kinds.Q8_0


def gguf_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` is ``blk.3.ffn_up.weight``."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    _, _, layer, *middle, leaf = name.split(".")
    return f"blk.{layer}.{LAYER_NAMES['.'.join(middle)]}.{leaf}"


def gguf_package() -> Any:
    """The module ``gguf``.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError("engine='llama.cpp' writes GGUF and needs: pip install gguf") from error
    return gguf
