"""Statistics of a backward pass: the gradient of the loss with respect to a gate on every unit.

A gate g on a dimension (1 in the intact model) multiplies it at all positions of a document, so
dL/dg = Σ_pos k · dL/dk. Only the gradient at the keys is needed, not an actual gate. A rotary pair
has one gate for both dimensions. Its gradient is the sum of theirs and is the same before and
after the rotation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int

from gainlens.errors import InputError
from gainlens.model.forward import HEAD_POSITIONS, Head, before_head
from gainlens.model.hooks import Hook, attached
from gainlens.model.read_again import read_again
from gainlens.model.rotation import Turn
from gainlens.model.running import evaluating, model_device
from gainlens.model.sites import KeySites, Stage

Sums = dict[str, torch.Tensor]


def fisher_hooks(sites: KeySites, sums: Sums) -> list[Hook]:
    """Forward hooks that add each document's squared gate gradients at every key site."""
    computed = sites.rotary_dim > 0 and not sites.rotated_fires
    partner = sites.partner
    following = sites.rotation.follow()

    def add(stage: Stage, layer: int, keys: torch.Tensor, gradient: torch.Tensor) -> None:
        gate: Float[torch.Tensor, "document kv_head d_head"]
        gate = (
            (keys.double() * gradient.double()).sum(1)
            if keys.device.type != "mps"
            else (keys.float() * gradient.float()).sum(1)
        )
        for name, value in (
            ("fisher_sq", gate.square().sum(0)),
            ("fisher_cross", (gate * gate[..., partner.to(gate.device)]).sum(0)),
            ("fisher_documents", torch.full_like(gate[0], len(gate))),
        ):
            target = sums[f"{name}.{stage}"]
            target[layer] += value.to(target)

    def arrived(
        gradient: torch.Tensor, *, keys: torch.Tensor, layer: int, stage: Stage, turn: Turn | None
    ) -> None:
        add(stage, layer, keys, gradient)
        if turn is not None:
            add("rotated", layer, turn.heads(keys), turn.gradient(gradient))

    def wait(keys: torch.Tensor, hook: Any, *, layer: int, stage: Stage) -> torch.Tensor | None:
        if not torch.is_grad_enabled() or keys.is_inference():
            return None
        if not keys.requires_grad:  # all weights below are frozen
            keys = keys.detach().requires_grad_()
        turn = following.turn("k", layer, keys.shape[1]) if computed else None
        keys.register_hook(  # type: ignore[no-untyped-call]
            partial(arrived, keys=keys.detach(), layer=layer, stage=stage, turn=turn)
        )
        return keys

    return (following.hooks() if computed else []) + [
        (sites.key_hook(layer, stage), partial(wait, layer=layer, stage=stage))
        for layer in range(sites.n_layers)
        for stage in sites.stages
    ]


def forward_backward(model: Any, tokens: Int[torch.Tensor, "document pos"]) -> None:
    """Run a batch forwards and backwards to fire its hooks.

    The loss is the sum over documents of each document's mean next-token loss, so the gradient at
    a document's keys is that of its own loss. Weights get no gradient, since the graph starts at
    the residual stream.

    Raises:
        InputError: the loss is not finite.
    """
    start: list[torch.Tensor] = []

    def begin(x: torch.Tensor, hook: Any) -> torch.Tensor:
        start.append(x.detach().requires_grad_())
        return start[0]

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        attached(model, [("blocks.0.hook_resid_pre", begin)]),
        evaluating(model),
        read_again(model),
    ):
        # A copy, because tokens created in inference mode can't be part of a graph.
        tokens = tokens.clone().to(model_device(model))
        hidden, head = before_head(model, tokens)
        gradient = loss_gradient(head, hidden, tokens)
        torch.autograd.grad(hidden, start, gradient)


def loss_gradient(
    head: Head,
    hidden: Float[torch.Tensor, "document pos width"],
    tokens: Int[torch.Tensor, "document pos"],
) -> Float[torch.Tensor, "document pos width"]:
    """Gradient of the sum of the documents' mean next-token losses, at the head's input.

    The head processes ``HEAD_POSITIONS`` positions at a time, so memory does not grow with the
    length of the text times the vocabulary.

    Raises:
        InputError: the loss is not finite.
    """
    gradient = torch.zeros_like(hidden)
    n_targets = tokens.shape[1] - 1
    for row, targets, found in zip(hidden.detach(), tokens[:, 1:], gradient, strict=True):
        for start in range(0, n_targets, HEAD_POSITIONS):
            part = slice(start, min(start + HEAD_POSITIONS, n_targets))
            leaf = row[None, part].clone().requires_grad_()
            loss = torch.nn.functional.cross_entropy(
                head(leaf)[0].float(), targets[part], reduction="sum"
            )
            if not bool(torch.isfinite(loss)):
                raise InputError("the loss is not finite; expected weights without NaN or infinity")
            found[part] = torch.autograd.grad(loss / n_targets, leaf)[0][0]
    return gradient
