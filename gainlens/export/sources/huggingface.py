"""A transformers model as a source; its keys are masked by forward hooks that are taken off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int

from gainlens.export.families import SlimFamily
from gainlens.export.sources.base import Flows, KeyMap, Source, ValueMap
from gainlens.export.weights import AttentionWeights
from gainlens.model.wrapping import architecture_of


class HuggingFaceSource(Source):
    """See ``Source``."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, model.config, architecture_of(model))

    def attention(self, layer: int) -> AttentionWeights:
        """See ``Source``."""
        module = self.model.get_submodule(self.family.attention.format(layer))
        tensors = {name: p.detach() for name, p in module.named_parameters()}
        return self.family.read(tensors, self.config)

    def others(self, wanted: list[str]) -> Iterator[tuple[str, Float[torch.Tensor, "..."]]]:
        """See ``Source``."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name in wanted:
            yield name, parameters[name].detach()

    def logits(
        self,
        tokens: Int[torch.Tensor, "document pos"],
        keys: KeyMap | None = None,
        values: ValueMap | None = None,
    ) -> Float[torch.Tensor, "document pos vocab"]:
        """See ``Source``."""
        with ExitStack() as stack, torch.no_grad():
            self._masked(stack, keys, values)
            out = self.model(tokens.to(self.device), use_cache=False).logits
        found: torch.Tensor = out.float().cpu()
        return found

    def flows(self, batches: list[Int[torch.Tensor, "_ _"]], keys: KeyMap | None) -> Flows:
        """See ``Source``."""
        n_layers, n_kv, _ = self.shape
        sums: list[Any] = [0] * n_layers
        count = 0

        def record(module: Any, args: Any, *, layer: int) -> None:
            sums[layer] = sums[layer] + second_moment(args[0], n_kv, self._n_heads)

        with ExitStack() as stack, torch.no_grad():
            self._masked(stack, keys, None)
            for layer in range(n_layers):
                out = self._attention_module(layer).get_submodule(self.family.output)
                handle = out.register_forward_pre_hook(partial(record, layer=layer))
                stack.callback(handle.remove)
            for batch in batches:
                self.model(batch.to(self.device), use_cache=False, logits_to_keep=1)
                count += batch.numel()
        return torch.stack(sums) / count

    @property
    def _n_heads(self) -> int:
        return int(self.config.num_attention_heads)

    def _attention_module(self, layer: int) -> Any:
        return self.model.get_submodule(self.family.attention.format(layer))

    def _masked(self, stack: ExitStack, keys: KeyMap | None, values: ValueMap | None) -> None:
        was_training = self.model.training
        self.model.eval()
        stack.callback(self.model.train, was_training)
        for layer in range(self.n_layers):
            module = self._attention_module(layer)
            if keys is not None:
                site = self.family.key_site
                name = "k_norm" if site.startswith("k_norm") else site
                hook = _key_hook(self.family, keys[layer].to(self.device, self.dtype))
                handle = module.get_submodule(name).register_forward_hook(hook)
                stack.callback(handle.remove)
            if values is not None:
                pre = partial(
                    _project_values, maps=values[layer].to(self.device), heads=self._n_heads
                )
                out = module.get_submodule(self.family.output)
                handle = out.register_forward_pre_hook(pre)
                stack.callback(handle.remove)


def second_moment(
    z: Float[torch.Tensor, "batch pos flat"], n_kv_heads: int, n_heads: int
) -> Float[torch.Tensor, "kv_head d_value d_value"]:
    """Sum over tokens of z zᵀ, mean over the query heads of each key head; float64, CPU."""
    rows = z.detach().reshape(-1, n_kv_heads, n_heads // n_kv_heads, z.shape[-1] // n_heads)
    by_head = rows.permute(1, 0, 2, 3).flatten(1, 2).float()
    moment = torch.bmm(by_head.transpose(1, 2), by_head).double().cpu()
    return moment / (n_heads // n_kv_heads)


def _key_hook(
    family: SlimFamily, maps: Float[torch.Tensor, "kv_head d_head d_head"]
) -> Callable[[Any, Any, torch.Tensor], torch.Tensor]:
    """A forward hook that multiplies the keys in a module's output."""
    n_kv, d_head, _ = maps.shape
    spec = "...kd,kde->...ke"

    def hook(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        site = family.key_site
        if site == "k_norm_by_head":
            return torch.einsum("bkpd,kde->bkpe", out, maps)
        if site == "k_norm_by_pos":
            return torch.einsum(spec, out, maps)
        if site == "k_proj":
            heads = out.reshape(*out.shape[:-1], n_kv, d_head)
            return torch.einsum(spec, heads, maps).flatten(-2)
        by = (n_kv, 3, d_head) if site == "query_key_value" else (3, n_kv, d_head)
        parts = list(
            out.reshape(*out.shape[:-1], *by).unbind(-2 if site == "query_key_value" else -3)
        )
        parts[1] = torch.einsum(spec, parts[1], maps)
        return torch.stack(parts, -2 if site == "query_key_value" else -3).flatten(-3)

    return hook


def _project_values(
    module: Any,
    args: tuple[torch.Tensor, ...],
    *,
    maps: Float[torch.Tensor, "kv_head d_value d_value"],
    heads: int,
) -> tuple[torch.Tensor, ...]:
    z = args[0].reshape(*args[0].shape[:-1], heads, -1)
    wide = maps.to(z.dtype).repeat_interleave(heads // len(maps), 0)
    return (torch.einsum("...hd,hde->...he", z, wide).flatten(-2), *args[1:])
