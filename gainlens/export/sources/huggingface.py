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
from gainlens.export.families import KeySite
from gainlens.export.slot_rotation import turned_by
from gainlens.export.sources.base import Flows, ProjectionMaps, Source, ValueMap
from gainlens.model.attention_weights import AttentionWeights
from gainlens.model.running import evaluating
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

    def attention(self, layer: int) -> AttentionWeights:
        """See ``Source``."""
        module = self.model.get_submodule(self.family.attention.format(layer))
        tensors = {name: p.detach() for name, p in module.named_parameters()}
        return self.family.layout.read(tensors, self.config)

    def others(self, wanted: list[str]) -> Iterator[tuple[str, Float[torch.Tensor, "..."]]]:
        """See ``Source``."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name in wanted:
            yield name, parameters[name].detach()

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
                if maps is None:
                    continue
                name, hook = _map_hook(
                    self.family.key_site,
                    kind,
                    maps[layer].to(self.device, self.dtype),
                    None if cut is None else cut.turn(layer),
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


def _map_hook(
    site: KeySite,
    kind: str,
    maps: Float[torch.Tensor, "head d_head d_head"],
    turn: Float[torch.Tensor, "kv_head pair"] | None = None,
) -> tuple[str, Callable[[Any, Any, torch.Tensor], torch.Tensor]]:
    """Name of a module, and a forward hook that multiplies the keys (or queries) in its output."""
    n_heads, d_head, _ = maps.shape
    spec = "...hd,hde->...he"

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x if turn is None else turned_by(x, turn)

    def by_head(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return by_pos(module, args, out.transpose(1, 2)).transpose(1, 2)

    def by_pos(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return turned(torch.einsum(spec, out, maps))

    def flat(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        heads = out.reshape(*out.shape[:-1], n_heads, d_head)
        return turned(torch.einsum(spec, heads, maps)).flatten(-2)

    def joint(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        heads_first = site == "query_key_value"
        shape, axis = ((n_heads, 3, d_head), -2) if heads_first else ((3, n_heads, d_head), -3)
        parts = list(out.reshape(*out.shape[:-1], *shape).unbind(axis))
        which = "qkv".index(kind)
        parts[which] = turned(torch.einsum(spec, parts[which], maps))
        return torch.stack(parts, axis).flatten(-3)

    if site == "k_norm_by_head":
        return f"{kind}_norm", by_head
    if site == "k_norm_by_pos":
        return f"{kind}_norm", by_pos
    if site == "k_proj":
        return f"{kind}_proj", flat
    return site, joint


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
