"""Checkpoints without code of gainlens, for transformers and vLLM.

Stock classes have one head size and one set of rotary frequencies for all layers and heads. Any
universal subset of rotary pairs fits: the kept frequencies are written as ``longrope`` factors, and
the softmax scale of the full head is folded into the query projection. If values are as wide as
keys, the class is a plain ``LlamaForCausalLM``. Otherwise it is ``MiMoV2FlashForCausalLM``, which
has a separate value width, with dense layers and full attention.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float

from gainlens.export.after_norm import maps_after_norm
from gainlens.export.engines.base import Engine, EngineLimitError
from gainlens.export.engines.own import save
from gainlens.export.modeling import family_of, plan_of
from gainlens.export.plan import SlicePlan
from gainlens.files import write_json

VLLM_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
SILU = ("silu", "swish")
"""Two names of one function; vLLM accepts only the first."""
FIXED_ROPES = ("default", "linear", "llama3", "yarn")
THIN_KEYS = "MiMoV2FlashForCausalLM"


class TransformersEngine(Engine):
    """Stock transformers."""

    name = "transformers"
    heads: tuple[int, ...] | None = None
    """Head sizes that the engine accepts; None for any even size."""
    silu_only = False
    """Whether its Llama supports only ``silu``."""

    def check(self, slim: Any) -> None:
        """Raise ``EngineLimitError`` unless the model fits a stock class."""
        check_stock(slim, self.name, self.heads, self.silu_only, self.wide_values)
        if not values_as_keys(slim.config):
            check_plain(slim, self.name, THIN_KEYS, "o")
            if not hasattr(transformers, THIN_KEYS):
                raise EngineLimitError(
                    f"engine={self.name!r} keeps values wider than keys in {THIN_KEYS}, which "
                    f"transformers {transformers.__version__} does not have: install a later one",
                    _narrow(slim.config),
                )

    def notes(self, slim: Any) -> tuple[str, ...]:
        """Limits of the class for wide values."""
        if values_as_keys(slim.config):
            return ()
        return (
            f"values wider than keys are kept as {THIN_KEYS}: transformers 5 alone loads it "
            "(neither transformers 4 nor vLLM), with eager attention unless attn_implementation "
            "names a registered one, such as 'gainlens_sliced' after import gainlens",
        )

    def write(self, slim: Any, folder: Path, precision: str, tokenizer: Any | None) -> None:
        """``config.json``, ``model.safetensors`` and the tokenizer's files."""
        stock = stock_llama(slim) if values_as_keys(slim.config) else thin_key_model(slim)
        save(stock, folder, precision, tokenizer)
        if values_as_keys(slim.config):
            _for_transformers_4(folder / "config.json")

    def query_fold(self, slim: Any) -> float:
        """The softmax scale of the full head."""
        return query_fold(slim)

    def read_back(self, folder: Path, device_map: Any = None) -> Any:
        """Load with the stock class named in the files."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, device_map=device_map
        )


class VllmEngine(TransformersEngine):
    """vLLM; values as wide as keys, and the head sizes of its CPU back end.

    Its GPU back ends accept all of these sizes too. The parity gate runs the files in transformers;
    ``make engines`` runs them in vLLM itself.
    """

    name = "vllm"
    heads = VLLM_CPU_HEADS
    silu_only = True
    wide_values = False

    def notes(self, slim: Any) -> tuple[str, ...]:
        """None: ``check`` covers the head sizes."""
        return ()


def values_as_keys(config: Any) -> bool:
    """Whether all value heads are as wide as the key heads."""
    plan = plan_of(config)
    width = plan.key_widths(family_of(config).rotary_dim(config))[0]
    return set(plan.value_widths or (plan.shape[2],)) == {width}


def check_stock(
    slim: Any,
    engine: str,
    heads: tuple[int, ...] | None,
    silu_only: bool = False,
    wide_values: bool = False,
) -> None:
    """Raise ``EngineLimitError`` with the limit and the nearest plan that fits.

    Args:
        slim: with the ``config`` of a slim model.
        engine: its name in error messages.
        heads: head sizes that it accepts, or None for any even size.
        silu_only: whether it always runs ``silu``, whatever the checkpoint says.
        wide_values: whether the width of values may differ from that of keys.
    """
    family, config, plan = family_of(slim.config), slim.config, plan_of(slim.config)
    if maps_after_norm(config):
        raise EngineLimitError(
            f"engine={engine!r} has no place for the maps that this {family.model_class} keeps "
            "between the norm on its keys and the rotation (engine='gainlens' takes them)"
        )
    if not family.llama:
        raise EngineLimitError(
            f"engine={engine!r} needs a model that stock LlamaForCausalLM expresses; "
            f"{family.model_class} is not one (engine='gainlens' takes it)"
        )
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
    # Prefer too wide to too narrow: a wider head keeps everything that the plan keeps.
    best = min((s for s in sizes if s >= mean - 1e-6), default=max(sizes, default=0))
    values = set(plan.value_widths or (d_head,))
    kept_values = wide_values and len(values) == 1
    nearest, hint = None, f"; no width up to {d_head} fits"
    if best:
        nearest = plan.nearest_shared(rotary_dim, best)
        call = f"plan.nearest_shared({rotary_dim}, {best})"
        if not kept_values:
            nearest, call = nearest.with_values(best), f"{call}.with_values({best})"
        hint = f"; the nearest plan that fits is {call}"
    if not plan.shared:
        raise EngineLimitError(
            f"engine={engine!r} has one set of rotary pairs for all layers and heads: this plan's "
            "heads keep different ones, which engine='gainlens' takes; for one set choose the cut "
            f"with scope='universal'{hint}",
            nearest,
        )
    width = plan.key_widths(rotary_dim)[0]
    if width not in sizes:
        raise EngineLimitError(
            f"engine={engine!r} takes heads of {', '.join(map(str, heads or ()))} dimensions: this "
            f"plan keeps {width}{hint}",
            nearest,
        )
    if values != {width} and not kept_values:
        wanted = "values of one width in all layers" if wide_values else "values as wide as keys"
        raise EngineLimitError(
            f"engine={engine!r} has {wanted}: this plan keeps {width} key and "
            f"{', '.join(map(str, sorted(values)))} value dimensions{hint}",
            nearest,
        )


def check_plain(slim: Any, engine: str, container: str, biases: str) -> None:
    """Raise ``EngineLimitError`` if the class for thin keys lacks a bias of the model.

    Args:
        slim: with the ``config`` of a slim model.
        engine, container: their names in the error message.
        biases: which of the biases ``q``, ``k``, ``v`` and ``o`` the container lacks.
    """
    found = [f"{n}_proj" for n in biases if n in slim.config.gainlens["biases"]]
    found += ["mlp"] if getattr(slim.config, "mlp_bias", False) else []
    if found:
        plan = _narrow(slim.config)
        assert plan.value_widths is not None
        raise EngineLimitError(
            f"engine={engine!r} keeps values wider than keys in {container}, which has no bias on "
            f"{', '.join(found)}: this model has; with values as wide as keys it fits a stock "
            f"Llama: plan.with_values({plan.value_widths[0]})",
            plan,
        )


def _narrow(config: Any) -> SlicePlan:
    """The same plan with values as wide as keys."""
    plan = plan_of(config)
    return plan.with_values(plan.key_widths(family_of(config).rotary_dim(config))[0])


def longrope_factors(slim: Any) -> tuple[float, list[float]]:
    """Base θ, and the factors that give the i-th kept frequency as θ^(-2i/r) / factor."""
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
    """Factor that is folded into the query weights of a stock model.

    Stock classes scale by 1/√width. The factor restores the scale of the full head, and the scaling
    of cos and sin that some rotary types have.
    """
    first = slim.model.layers[0].self_attn
    turn_scale = float(slim.model.rotary_emb.attention_scaling)
    return float(first.scaling) * math.sqrt(first.head_dim) * turn_scale**2


def folded_state(slim: Any) -> dict[str, Float[torch.Tensor, "..."]]:
    """Weights of a slim model in float32 on the CPU, with the softmax scale in the queries."""
    fold = query_fold(slim)
    return {
        name: tensor.detach().float().cpu() * (fold if ".self_attn.q_proj." in name else 1.0)
        for name, tensor in slim.state_dict().items()
        if not name.endswith("rope_index")
    }


def stock_llama(slim: Any) -> Any:
    """The slim model as a ``LlamaForCausalLM`` in float32 on the CPU; see ``check_stock``."""
    theta, factors = longrope_factors(slim)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if any(abs(f - 1) > 1e-6 for f in factors):  # beyond float32 rounding
        rope = _longrope(slim.config, theta, factors)
    stock_config = transformers.LlamaConfig(
        **_common(slim),
        mlp_bias=bool(getattr(slim.config, "mlp_bias", False)),
        rope_parameters=rope,
    )
    return _filled(transformers.LlamaForCausalLM(stock_config), slim)


def thin_key_model(slim: Any) -> Any:
    """The slim model as a ``MiMoV2FlashForCausalLM``, which has a separate value width."""
    theta, factors = longrope_factors(slim)
    n_layers = int(slim.config.num_hidden_layers)
    config = transformers.MiMoV2FlashConfig(
        **_common(slim),
        v_head_dim=int(slim.model.layers[0].self_attn.value_dim),
        layer_types=["full_attention"] * n_layers,
        mlp_layer_types=["dense"] * n_layers,
        attention_value_scale=None,
        rope_parameters={"full_attention": _longrope(slim.config, theta, factors)},
    )
    return _filled(transformers.MiMoV2FlashForCausalLM(config), slim)


def _common(slim: Any) -> dict[str, Any]:
    """Settings that both stock classes share."""
    config = slim.config
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings",
        "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return {
        **{name: getattr(config, name) for name in same},
        "head_dim": int(slim.model.layers[0].self_attn.head_dim),
        "hidden_act": "silu" if config.hidden_act in SILU else config.hidden_act,
        "attention_bias": bool(config.gainlens["biases"]),
    }


def _longrope(config: Any, theta: float, factors: list[float]) -> dict[str, Any]:
    # Equal lengths, because vLLM derives an attention factor from their ratio.
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "factor": 1.0,
        "attention_factor": 1.0,
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": int(config.max_position_embeddings),
    }


def _filled(stock: Any, slim: Any) -> Any:
    """``stock`` with the slim model's weights and generation settings; missing biases are zero."""
    state = folded_state(slim)
    for name, tensor in stock.state_dict().items():
        if name.endswith("_proj.bias") and name not in state:
            state[name] = torch.zeros_like(tensor)
    stock.load_state_dict(state, strict=True)
    stock.generation_config = type(slim.generation_config).from_dict(
        slim.generation_config.to_dict()
    )
    return stock.eval()


def _for_transformers_4(file: Path) -> None:
    """Add the rotary settings for transformers 4, which ignores ``rope_parameters``."""
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    write_json(file, config)
