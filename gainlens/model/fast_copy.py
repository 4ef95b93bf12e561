"""A Hugging Face model that shares a bridge's weights, for forward passes with fused attention.

A bridge computes attention step by step, since each step is a hook. If only the keys or queries
after the rotation are edited, the model's own code with PyTorch's fused attention gives the same
loss faster. The fast copy is built from the same configuration around the same tensors, so it
needs no extra memory, and the user's model is neither changed nor called.

The edit happens inside a custom attention function, registered with transformers under a name that
only fast copies use. At that point all norms and rotations have been applied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int

from gainlens.model.linear import use_fast_linear
from gainlens.model.running import is_exact, model_device

NAME = "gainlens_fast_copy"
ATTRIBUTE = "_gainlens_fast_copy"

Edit = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""Takes queries ``[batch, pos, head, d_head]``, keys ``[batch, pos, kv_head, d_head]`` (both after
all norms and rotations) and the layer; returns the queries and keys that attention uses instead."""


class FastCopy:
    """A Hugging Face model that shares a bridge's tensors.

    Attributes:
        model: a transformers model without weights of its own.
        n_layers: number of attention layers that must call the edit.
        scaling: scale of the attention logits; None before the first pass.
        plain: whether all attention so far was purely causal, without soft cap or window.
    """

    def __init__(self, model: Any, n_layers: int) -> None:
        self.model = model
        self.n_layers = n_layers
        self._head = family_head(model)
        self._layers = _layers(model, n_layers)
        self._edit: Edit | None = None
        self._fires = [0] * n_layers
        self._in_tuple = False
        self.scaling: float | None = None
        self.plain = True
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                object.__setattr__(module, ATTRIBUTE, self)

    @property
    def device(self) -> torch.device:
        """Device of the shared tensors."""
        return model_device(self.model)

    @property
    def exact(self) -> bool:
        """Whether the weights are at least float32, so that two implementations agree closely."""
        return is_exact(self.model)

    @contextmanager
    def edited(self, edit: Edit | None) -> Iterator[None]:
        """Apply ``edit`` to all passes inside the ``with`` block."""
        self._edit = edit
        try:
            yield
        finally:
            self._edit = None

    def hidden(
        self, tokens: Int[torch.Tensor, "document pos"]
    ) -> Float[torch.Tensor, "document pos d_model"]:
        """The output head's input, after the last norm."""
        self._fires = [0] * self.n_layers
        base = self.model.base_model
        found: torch.Tensor = base(input_ids=tokens, use_cache=False).last_hidden_state
        return found

    def residuals(
        self, tokens: Int[torch.Tensor, "document pos"]
    ) -> list[Float[torch.Tensor, "document pos d_model"]]:
        """The input of each layer in a forward pass on ``tokens``."""
        found: list[torch.Tensor] = []

        def before(module: Any, args: Any, kwargs: Any) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])

        def after(module: Any, args: Any, output: Any) -> None:
            self._in_tuple = isinstance(output, tuple)

        handles = [x.register_forward_pre_hook(before, with_kwargs=True) for x in self._layers]
        handles.append(self._layers[0].register_forward_hook(after))
        try:
            self.hidden(tokens)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def hidden_from(
        self,
        layer: int,
        residual: Float[torch.Tensor, "document pos d_model"],
        tokens: Int[torch.Tensor, "document pos"],
    ) -> Float[torch.Tensor, "document pos d_model"]:
        """Like ``hidden``, but start at ``layer`` with ``residual`` as its input.

        Requires an earlier call of ``residuals``.
        """
        given = (residual,) if self._in_tuple else residual
        for skipped in self._layers[:layer]:
            skipped.forward = lambda *args, **kwargs: given
        try:
            return self.hidden(tokens)
        finally:
            for skipped in self._layers[:layer]:
                del skipped.forward

    def logits(
        self, hidden: Float[torch.Tensor, "document pos d_model"]
    ) -> Float[torch.Tensor, "document pos vocab"]:
        """Apply the family's own head, including scale and soft cap, to part of ``hidden``."""
        return self._head(hidden)

    @property
    def complete(self) -> bool:
        """Whether the edit was called once in every layer of the last pass."""
        return self.complete_from(0)

    def complete_from(self, layer: int) -> bool:
        """Like ``complete``, for the layers from ``layer`` on."""
        return all(n == 1 for n in self._fires[layer:])

    def attention(self, module: Any, query: torch.Tensor, key: torch.Tensor) -> Any:
        """Edit queries and keys ``[batch, head, pos, d_head]``, for the attention function."""
        layer = int(module.layer_idx)
        self._fires[layer] += 1
        if self._edit is None:
            return query, key
        q, k = self._edit(query.transpose(1, 2), key.transpose(1, 2), layer)
        return q.transpose(1, 2), k.transpose(1, 2)


def build_fast_copy(bridge: Any) -> FastCopy | None:
    """A fast copy of ``bridge``, or None if its model can't be rebuilt around its tensors.

    Callers must first compare the fast copy with the bridge: see
    ``gainlens.analysis.sweep.evaluator``.
    """
    original = getattr(bridge, "original_model", None)
    if original is None or not hasattr(original, "config"):
        return None
    try:
        _register()
        model = twin(original, NAME)
        if model is None:
            return None
        use_fast_linear(model)
        return FastCopy(model.eval(), int(bridge.cfg.n_layers))
    except Exception:  # any family may fail here; the caller then uses hooks
        return None


def twin(original: Any, attention: str) -> Any | None:
    """A transformers model that shares the tensors of a bridge's wrapped model, or None.

    Args:
        original: the model that the bridge wraps.
        attention: name of the attention implementation.
    """
    config = copy.deepcopy(original.config)
    config._attn_implementation = attention
    with torch.device("meta"):
        model = type(original)(config)
    return model.eval() if _share(model, original) else None


def _share(model: Any, original: Any) -> bool:
    """Assign the tensors of a wrapped model to ``model``; False if one is missing."""
    have: dict[str, torch.Tensor] = {}
    for found in (original.named_parameters(remove_duplicate=False), _buffers(original)):
        for name, tensor in found:
            have.setdefault(name.replace("_original_component.", ""), tensor)
    wanted = list(model.named_parameters(remove_duplicate=False)) + list(_buffers(model))
    if len({held.device for held in original.parameters()}) > 1:  # hooks move between devices
        return False
    for name, tensor in wanted:
        other = have.get(name)
        if other is None or other.shape != tensor.shape or other.is_meta:
            return False
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        table = owner._parameters if leaf in owner._parameters else owner._buffers
        table[leaf] = other
    return True


def _layers(model: Any, n_layers: int) -> list[Any]:
    """The model's decoder layers, in order."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers:
            return list(module)
    return []


def _buffers(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in module._buffers.items():
            if tensor is not None:
                yield (f"{prefix}.{leaf}" if prefix else leaf), tensor


class _Given(torch.nn.Module):
    """Replaces the layers and returns a given output."""

    given: torch.Tensor | None = None

    @property
    def decoder(self) -> _Given:
        """Itself: some families access ``decoder`` on the container of their layers."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.given)


def family_head(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A transformers model's own output head, including scale and soft cap.

    Args:
        model: a causal language model, or the one inside a bridge.

    Returns:
        A function from hidden states ``[document, pos, d_model]``, at any positions, to logits
        ``[document, pos, vocab]``.
    """
    head = copy.copy(model)
    head._modules = dict(model._modules)
    # accelerate puts a forward into the instance that runs the model copied from.
    for name in ("forward", "_hf_hook", "_old_forward") if hasattr(model, "_hf_hook") else ():
        vars(head).pop(name, None)
    stub = head._modules[model.base_model_prefix] = _Given()

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        stub.given = hidden
        try:
            found: torch.Tensor = head(inputs_embeds=hidden, use_cache=False).logits
        finally:
            stub.given = None
        return found

    return logits


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    fast_copy: FastCopy = getattr(module, ATTRIBUTE)
    fast_copy.plain &= attention_mask is None and kwargs.get("softcap") is None
    fast_copy.scaling = kwargs.get("scaling")
    query, key = fast_copy.attention(module, query, key)
    if kwargs.get("softcap") is None:
        kwargs.pop("softcap", None)
        found: tuple[torch.Tensor, Any] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return found
    return _soft_capped(query, key, value, attention_mask, kwargs), None


def _soft_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Attention with soft-capped logits; no fused CPU kernel supports them."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    cap = float(kwargs["softcap"])
    logits = torch.tanh(query @ key.transpose(-1, -2) * (kwargs["scaling"] / cap)) * cap
    if mask is None:
        size = logits.shape[-2:]
        mask = torch.ones(size, dtype=torch.bool, device=logits.device).tril()
    if mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    else:
        logits = logits + mask
    return (logits.float().softmax(-1).to(value.dtype) @ value).transpose(1, 2)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
