"""A transformers model as a source; its keys are masked by forward hooks that are taken off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int

from gainlens.errors import UnsupportedModelError
from gainlens.export.slot_rotation import turned_by
from gainlens.export.sources.base import Flows, ProjectionMaps, Source, ValueMap
from gainlens.model.attention_layouts import check_same_layers
from gainlens.model.attention_weights import AttentionWeights
from gainlens.model.running import evaluating
from gainlens.model.stored_weights import StoredWeights
from gainlens.model.wrapping import architecture_of


class HuggingFaceSource(Source):
    """See ``Source``."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, model.config, architecture_of(model))
        # A checkpoint's architecture may be named by another class that read it.
        expected: Any = getattr(transformers, self.family.model_class)
        if not isinstance(model, expected):
            raise UnsupportedModelError(
                f"model={type(model).__name__} of a {self.architecture} checkpoint can't be made "
                f"slim: expected {expected.__name__} (AutoModelForCausalLM.from_pretrained)"
            )

        self.tensors = StoredWeights(model)
        tensors = dict(model.named_parameters())
        check_same_layers(tensors, self.family.layout, self.n_layers, self.architecture)

    def attention(self, layer: int) -> AttentionWeights:
        """See ``Source``."""
        tensors = self.tensors.under(f"{self.family.attention.format(layer)}.")
        return self.family.layout.read(tensors, self.config)

    def others(self, wanted: list[str]) -> Iterator[tuple[str, Float[torch.Tensor, "..."]]]:
        """See ``Source``."""
        for name in wanted:
            yield name, self.tensors[name]

    def logits(
        self,
        tokens: Int[torch.Tensor, "document pos"],
        cut: ProjectionMaps | None = None,
        values: ValueMap | None = None,
    ) -> Float[torch.Tensor, "document pos vocab"]:
        """See ``Source``."""
        with ExitStack() as stack, torch.no_grad():
            self._masked(stack, cut, values)
            out = self.model(tokens.to(self.device), use_cache=False).logits
        return at_least_float(out)

    def flows(self, batches: list[Int[torch.Tensor, "_ _"]], cut: ProjectionMaps | None) -> Flows:
        """See ``Source``."""
        n_layers, n_kv, _ = self.shape
        sums: list[Any] = [0] * n_layers
        count = 0

        def record(module: Any, args: Any, *, layer: int) -> None:
            sums[layer] = sums[layer] + second_moment(args[0], n_kv, self._n_heads)

        with ExitStack() as stack, torch.no_grad():
            self._masked(stack, cut, None)
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

    def _masked(
        self, stack: ExitStack, cut: ProjectionMaps | None, values: ValueMap | None
    ) -> None:
        stack.enter_context(evaluating(self.model))
        for layer in range(self.n_layers):
            module = self._attention_module(layer)
            for kind, maps in () if cut is None else (("k", cut.keys), ("q", cut.queries)):
                if maps is None or cut is None:
                    continue
                name, hook = self._map_hook(
                    kind, maps[layer].to(self.device, self.dtype), cut, layer
                )
                handle = module.get_submodule(name).register_forward_hook(hook)
                stack.callback(handle.remove)
            if values is not None:
                pre = partial(
                    _project_values, maps=values[layer].to(self.device), heads=self._n_heads
                )
                out = module.get_submodule(self.family.output)
                handle = out.register_forward_pre_hook(pre)
                stack.callback(handle.remove)

    def _map_hook(
        self,
        kind: str,
        maps: Float[torch.Tensor, "head d_head d_head"],
        cut: ProjectionMaps,
        layer: int,
    ) -> tuple[str, Callable[[Any, Any, torch.Tensor], torch.Tensor]]:
        """Name of a module, and a forward hook that maps the keys (or queries) in its output."""
        layout, norm = self.family.layout, self.family.key_norm(self.config)
        turn = cut.turn(layer)
        rows = layout.rows(self.config)[kind].to(maps.device)
        shape = "flat" if norm is None else norm.shape

        def mapped(x: torch.Tensor) -> torch.Tensor:
            new = torch.einsum("...hd,hde->...he", x, maps)
            return new if turn is None else turned_by(new, turn, cut.pairing)

        def by_head(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            return mapped(out.transpose(1, 2)).transpose(1, 2)

        def by_pos(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            return mapped(out)

        def flat(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            """The output may hold queries, keys and values; of a norm, one of these."""
            if norm is not None:
                return mapped(out.reshape(*out.shape[:-1], len(maps), -1)).flatten(-2)
            new = out.clone()
            new[..., rows] = mapped(out[..., rows])
            return new

        name = layout.part(kind) if norm is None else layout.norms["qk".index(kind)]
        return name, {"by_head": by_head, "by_pos": by_pos, "flat": flat}[shape]


def second_moment(
    z: Float[torch.Tensor, "batch pos flat"], n_kv_heads: int, n_heads: int
) -> Float[torch.Tensor, "kv_head d_value d_value"]:
    """Sum over tokens of z zᵀ, mean over the query heads of each key head; float64, CPU."""
    rows = z.detach().reshape(-1, n_kv_heads, n_heads // n_kv_heads, z.shape[-1] // n_heads)
    by_head = rows.permute(1, 0, 2, 3).flatten(1, 2).float()
    moment = torch.bmm(by_head.transpose(1, 2), by_head).double().cpu()
    return moment / (n_heads // n_kv_heads)


def at_least_float(logits: torch.Tensor) -> torch.Tensor:
    """On the CPU, half precision widened to float32."""
    return logits.cpu().to(torch.promote_types(logits.dtype, torch.float32))


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
