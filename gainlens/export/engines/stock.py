"""A plain ``LlamaForCausalLM`` checkpoint, with no code of gainlens: for transformers and vLLM.

Such a checkpoint has one head size and one set of rotary frequencies for all layers and heads,
and values as wide as keys. Any shared subset of rotary pairs fits: the kept frequencies go into
``longrope`` factors, and the softmax scale of the full head into the query projection.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from gainlens.export.engines.base import Engine, EngineLimitError
from gainlens.export.engines.own import save
from gainlens.export.modeling import family_of, plan_of
from gainlens.export.plan import SlicePlan

VLLM_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
SILU = ("silu", "swish")
"""Two names of one function; vLLM knows the first alone."""
FIXED_ROPES = ("default", "linear", "llama3", "yarn")


class TransformersEngine(Engine):
    """Stock transformers."""

    name = "transformers"
    heads: tuple[int, ...] | None = None
    """Head sizes that the engine takes; None for any even one."""
    silu_only = False
    """Whether its Llama knows one activation alone."""

    def check(self, slim: Any) -> None:
        """Raise ``EngineLimitError`` unless the model fits a stock Llama."""
        check_stock(slim, self.name, self.heads, self.silu_only)

    def write(self, slim: Any, folder: Path, precision: str, tokenizer: Any | None) -> None:
        """``config.json``, ``model.safetensors`` and the tokenizer's files."""
        save(stock_llama(slim), folder, precision, tokenizer)

    def query_fold(self, slim: Any) -> float:
        """The softmax scale of the full head."""
        return query_fold(slim)

    def read_back(self, folder: Path) -> Any:
        """Through transformers' own Llama."""
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


class VllmEngine(TransformersEngine):
    """vLLM; the same files, for the head sizes of its CPU back end.

    Its GPU back ends take all of these too. The gate runs the files in transformers, ``make
    engines`` in vLLM itself.
    """

    name = "vllm"
    heads = VLLM_CPU_HEADS
    silu_only = True


def check_stock(
    slim: Any, engine: str, heads: tuple[int, ...] | None, silu_only: bool = False
) -> None:
    """Raise ``EngineLimitError``, saying which limit and the nearest plan that fits."""
    family, config, plan = family_of(slim.config), slim.config, plan_of(slim.config)
    if not family.llama:
        raise EngineLimitError(
            f"engine={engine!r} needs a model that stock LlamaForCausalLM expresses; "
            f"{family.model_class} is not one (engine='gainlens' takes it)"
        )
    window = family.window(config, 0)
    if any(
        (window := family.window(config, layer)) is not None
        and window < config.max_position_embeddings
        for layer in range(config.num_hidden_layers)
    ):
        raise EngineLimitError(
            f"engine={engine!r} expects full attention in every layer: this {family.name} has a "
            f"sliding window of {window} (engine='gainlens' takes it)"
        )
    rope = str(config.rope_parameters.get("rope_type", "default"))
    if rope not in FIXED_ROPES:
        raise EngineLimitError(
            f"engine={engine!r} expects rotary frequencies that don't depend on the length: this "
            f"model has rope_type={rope!r}, which takes the place of the kept frequencies"
        )
    if silu_only and config.hidden_act not in SILU:
        raise EngineLimitError(
            f"engine={engine!r} runs Llama's MLPs with silu, whatever the checkpoint says: this "
            f"model has hidden_act={config.hidden_act!r} (engine='transformers' takes it)"
        )
    rotary_dim = family.rotary_dim(config)
    d_head = plan.shape[2]
    mean = plan.fraction_kept * d_head
    sizes = [s for s in heads or range(2, d_head + 1, 2) if s <= d_head]
    # Rather too wide than too narrow: a wider head keeps all that the plan keeps.
    best = min((s for s in sizes if s >= mean - 1e-6), default=max(sizes, default=0))
    nearest = plan.nearest_shared(rotary_dim, best).with_values(best) if best else None
    hint = (
        f"; the nearest plan that fits is plan.nearest_shared({rotary_dim}, {best})"
        f".with_values({best})"
        if best
        else f"; no width up to {d_head} fits"
    )
    if not plan.shared:
        raise EngineLimitError(
            f"engine={engine!r} has one set of rotary pairs for all layers and heads: this plan's "
            f"heads keep different ones{hint}",
            nearest,
        )
    width = plan.key_widths(rotary_dim)[0]
    if width not in sizes:
        raise EngineLimitError(
            f"engine={engine!r} takes heads of {', '.join(map(str, heads or ()))} dimensions: this "
            f"plan keeps {width}{hint}",
            nearest,
        )
    values = set(plan.value_widths or (d_head,))
    if values != {width}:
        raise EngineLimitError(
            f"engine={engine!r} has values as wide as keys: this plan keeps {width} key and "
            f"{', '.join(map(str, sorted(values)))} value dimensions{hint}",
            nearest,
        )


def longrope_factors(slim: Any) -> tuple[float, list[float]]:
    """Base θ, and the factors that turn θ^(-2i/r) into the i-th kept frequency.

    A frequency is θ^(-2i/r) / factor.
    """
    plan: SlicePlan = plan_of(slim.config)
    rotary = slim.model.rotary_emb
    kept = plan.turning(family_of(slim.config).rotary_dim(slim.config))[0][0].frequency
    assert kept is not None
    theta = float(slim.config.rope_parameters["rope_theta"])
    frequencies = rotary.inv_freq.detach().double().cpu()[torch.from_numpy(kept[0].copy())]
    # A slot of frequency zero would need an infinite factor; this one turns by less than rounding.
    still = 1e-6 / float(slim.config.max_position_embeddings)
    frequencies = frequencies.clamp_min(still)
    n = len(frequencies)
    plain = theta ** (-torch.arange(n, dtype=torch.float64) / n)
    return theta, (plain / frequencies).tolist()


def query_fold(slim: Any) -> float:
    """What goes into a stock model's queries.

    Stock scales by 1/√width; the full head's scale, and cos and sin that aren't of length 1, are
    folded in.
    """
    first = slim.model.layers[0].self_attn
    turn_scale = float(slim.model.rotary_emb.attention_scaling)
    return float(first.scaling) * math.sqrt(first.head_dim) * turn_scale**2


def stock_llama(slim: Any) -> Any:
    """The slim model as a ``LlamaForCausalLM`` in float32 on the CPU; see ``check_stock``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = slim.config
    first = slim.model.layers[0].self_attn
    width = int(first.head_dim)
    theta, factors = longrope_factors(slim)
    length = int(config.max_position_embeddings)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if any(abs(f - 1) > 1e-6 for f in factors):  # beyond float32 rounding
        # Both positions equal: vLLM would derive an attention factor from their ratio.
        rope = {
            "rope_type": "longrope",
            "rope_theta": theta,
            "factor": 1.0,
            "attention_factor": 1.0,
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": length,
        }
    biased = bool(config.gainlens["biases"])
    stock_config = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=width,
        hidden_act="silu" if config.hidden_act in SILU else config.hidden_act,
        max_position_embeddings=length,
        rms_norm_eps=config.rms_norm_eps,
        attention_bias=biased,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        rope_parameters=rope,
    )
    stock = LlamaForCausalLM(stock_config).eval()
    fold = query_fold(slim)
    state: dict[str, Float[torch.Tensor, "..."]] = {}
    for name, tensor in slim.state_dict().items():
        if name.endswith("rope_index"):
            continue
        state[name] = tensor.detach().float().cpu()
        if ".self_attn.q_proj." in name:
            state[name] = state[name] * fold
    for name, tensor in stock.state_dict().items():
        if name.endswith("_proj.bias") and name not in state:
            state[name] = torch.zeros_like(tensor)
    stock.load_state_dict(state, strict=True)
    stock.generation_config = type(slim.generation_config).from_dict(
        slim.generation_config.to_dict()
    )
    return stock
