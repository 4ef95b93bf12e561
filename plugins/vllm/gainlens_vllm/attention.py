"""The attention of a slim model in vLLM: thin keys, each head turned by its own frequencies."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from gainlens_vllm.configs import family_of, plan_of
from gainlens_vllm.errors import SlimFolderError
from gainlens_vllm.rotation import rotate, slot_frequencies
from gainlens_vllm.shards import heads_of_rank
from gainlens_vllm.widths import Route, equal_widths, summary, thin_widths

logger = init_logger("vllm.gainlens")  # vLLM shows loggers of its own name


def route_of(vllm_config: VllmConfig) -> Route:
    """The cached widths of all layers, and what computes the attention on this device.

    Raises:
        SlimFolderError: a device, or a width, that no backend takes.
    """
    config = vllm_config.model_config.hf_config
    plan, family = plan_of(config), family_of(config)
    # Asked for by name, Triton's attention is used anywhere: in its interpreter even on a CPU.
    asked = vllm_config.attention_config.backend == AttentionBackendEnum.TRITON_ATTN_DIFFKV
    if current_platform.is_cpu() and not asked:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        taken = CPUAttentionBackend.get_supported_head_sizes()
        route = equal_widths(plan, family.d_head(config), taken)
    elif current_platform.is_cuda_alike() or current_platform.is_xpu() or asked:
        route = thin_widths(plan, family.d_head(config))
    else:
        raise SlimFolderError(
            f"device {current_platform.device_name!r}: gainlens-vllm runs on CPUs and on GPUs with "
            "Triton"
        )
    (logger.warning_once if route.share >= 1 else logger.info_once)(
        "gainlens: %s.", summary(plan, route)
    )
    return route


class SlimAttention(nn.Module):
    """One layer's attention.

    Args:
        config: the slim configuration.
        prefix: name of the module; the number of the layer is in it.
        cache_config, quant_config: of vLLM.
        kwargs: what a family's decoder layer says besides; the plan decides instead.
    """

    frequencies: torch.Tensor

    def __init__(
        self,
        config: Any,
        prefix: str,
        cache_config: Any = None,
        quant_config: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        family, plan, layer = family_of(config), plan_of(config), extract_layer_index(prefix)
        route = route_of(get_current_vllm_config())
        _, total_kv, d_head = family.shape(config)
        total, d_model = int(config.num_attention_heads), int(config.hidden_size)
        size, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        queries, self.kv_heads = heads_of_rank(total, total_kv, size, rank)
        self.n_heads, self.n_kv_heads = len(queries), len(self.kv_heads)
        cut = plan.layers[layer]
        self.key_width, self.value_width = cut.key_width, cut.value_width
        self.cached_keys, self.cached_values = route.keys[layer], route.values[layer]
        self.projected = d_head if family.norm else cut.key_width
        self.qkv_proj = QKVParallelLinear(
            hidden_size=d_model,
            head_size=self.projected,
            total_num_heads=total,
            total_num_kv_heads=total_kv,
            bias=any(name in plan.biases for name in "qkv"),
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
            v_head_size=self.value_width,
        )
        if self.qkv_proj.bias is not None:  # a folder may have a bias on some of the three
            nn.init.zeros_(self.qkv_proj.bias)
        self.o_proj = RowParallelLinear(
            input_size=total * self.value_width,
            output_size=d_model,
            bias="o" in plan.biases,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.normed, self.offset = family.norm, family.norm_offset
        self.eps = float(getattr(config, "rms_norm_eps", 0.0))
        if family.norm:
            self.q_norm, self.k_norm = (self._norm_weight() for _ in range(2))
        turning = slot_frequencies(plan, config, family.rotary_dim(config), layer)
        self.turns, self.factor = turning is not None, 1.0
        if turning is not None:
            frequencies, self.factor = turning
            if len(frequencies) > 1:
                frequencies = frequencies[list(self.kv_heads)]
            # Float32 whatever the model's precision: a position multiplies it.
            self.register_buffer(
                "frequencies", frequencies.to(torch.get_default_device()), persistent=False
            )
        backend: Any = None
        if route.thin:
            from gainlens_vllm.backend import ThinKeysBackend

            backend = ThinKeysBackend
        self.attn = Attention(
            self.n_heads,
            self.cached_keys,
            family.scaling(config, layer),
            num_kv_heads=self.n_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=family.window(config, layer),
            prefix=f"{prefix}.attn",
            attn_backend=backend,
            head_size_v=self.cached_values,
        )

    def _norm_weight(self) -> nn.Parameter:
        """One row per key head of this rank."""
        weight = nn.Parameter(torch.ones(self.n_kv_heads, self.key_width), requires_grad=False)
        rows = self.kv_heads

        def load(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
            parameter.data.copy_(loaded[rows.start : rows.stop])

        weight.weight_loader = load  # type: ignore[attr-defined]
        return weight

    def forward(
        self, positions: torch.Tensor | None, hidden_states: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """``[token, d_model]`` in, ``[token, d_model]`` out; ``positions`` are ``[token]``."""
        qkv, _ = self.qkv_proj(hidden_states)
        queries, keys = self.n_heads * self.projected, self.n_kv_heads * self.projected
        q, k, v = qkv.split([queries, keys, self.n_kv_heads * self.value_width], dim=-1)
        q = q.reshape(-1, self.n_kv_heads, self.n_heads // self.n_kv_heads, self.projected)
        k = k.reshape(-1, self.n_kv_heads, 1, self.projected)
        v = v.reshape(-1, self.n_kv_heads, self.value_width)
        if self.normed:
            q, k = self._norm(q, self.q_norm), self._norm(k, self.k_norm)
        if self.turns and positions is not None:
            q = rotate(q, positions, self.frequencies, self.factor)
            k = rotate(k, positions, self.frequencies, self.factor)
        q, k = (_padded(x, self.cached_keys).flatten(1) for x in (q, k))
        out = self.attn(q, k, _padded(v, self.cached_values).flatten(1))
        if self.cached_values != self.value_width:
            out = out.view(-1, self.n_heads, self.cached_values)[..., : self.value_width]
            out = out.reshape(-1, self.n_heads * self.value_width)
        projected, _ = self.o_proj(out)
        return projected

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm whose statistic runs over the full head; only the kept slots are returned."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        factor = (weight.float() + self.offset)[None, :, None]
        return (wide[..., : self.key_width] * scale * factor).to(x.dtype)


def _padded(x: torch.Tensor, width: int) -> torch.Tensor:
    """Zeros behind each head: they change no product of a query and a key."""
    return x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))
