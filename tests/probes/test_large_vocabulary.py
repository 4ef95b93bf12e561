"""The output head sees a few positions at a time, so memory is bounded whatever the vocabulary."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, bridge, family_tokens

import gainlens as gl
from gainlens.model.forward import HEAD_POSITIONS, before_head, token_losses
from gainlens.probes import backward


def rows_of_the_head(model):
    """How many positions each call of the output head is given, and what stops the count."""
    seen = []
    module = model.unembed

    def count(module, args, output):
        seen.append(output.shape[:-1].numel())

    return seen, module.register_forward_hook(count)


def whole_fisher(model, tokens):
    """Squared gradients of a pair's gate by all logits at once, in plain TransformerLens hooks."""
    found = {}
    sites = gl.model.key_sites(model)

    def gate(keys, hook, layer):
        found[layer] = torch.ones(len(keys), *keys.shape[2:], requires_grad=True)
        return keys.detach().requires_grad_() * found[layer][:, None]

    hooks = [
        (sites.key_hook(n, "projected"), lambda k, hook, n=n: gate(k, hook, n))
        for n in range(sites.n_layers)
    ]
    # One layer at a time, so that a detached layer hides no other's gradient.
    rows = []
    for number, hook in enumerate(hooks):
        logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=[hook])
        logp = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        (gradient,) = torch.autograd.grad(-logp.mean(1).sum(), found[number])
        pair = gradient + torch.where(
            sites.partner != torch.arange(len(sites.partner)), gradient[..., sites.partner], 0.0
        )
        rows.append(pair.double().square().mean(0).sqrt())
    return torch.stack(rows).float()


def test_a_long_document_never_meets_the_head_whole(any_tiny, tiny_calibration):
    text = gl.load_tokens("sotu", any_tiny, n_docs=2, length=128)
    wanted = whole_fisher(any_tiny, text)
    seen, handle = rows_of_the_head(any_tiny)
    try:
        gains = gl.probe_gains(any_tiny, text, ("fisher",), progress=False)
    finally:
        handle.remove()
    assert seen and max(seen) <= HEAD_POSITIONS
    got = gains.score("fisher", stage="projected", unit="pair")
    torch.testing.assert_close(got, wanted, rtol=2e-4, atol=1e-7)


def test_losses_of_a_hooked_pass_too(any_tiny):
    text = gl.load_tokens("sotu", any_tiny, n_docs=2, length=128)
    with torch.no_grad():
        wanted = any_tiny(text, return_type="loss", loss_per_token=True)
    seen, handle = rows_of_the_head(any_tiny)
    try:
        got = token_losses(any_tiny, text)
    finally:
        handle.remove()
    assert max(seen) <= HEAD_POSITIONS
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_own_head(name, monkeypatch):
    """Soft caps and scales of logits are the family's; the gradient is that of all logits."""
    model, tokens = bridge(name), family_tokens(2, 10)
    monkeypatch.setattr(backward, "HEAD_POSITIONS", 4)
    with torch.enable_grad():
        logits = model(tokens, return_type="logits")
        hidden, head = before_head(model, tokens)
        if hidden.shape[-1] == model.cfg.d_vocab and head.__name__ == "_identity":
            pytest.skip("its head does not stand alone: all logits at once")
        torch.testing.assert_close(head(hidden), logits, rtol=1e-4, atol=1e-5)
        leaf = hidden.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(
            head(leaf)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        (wanted,) = torch.autograd.grad(loss.reshape(2, -1).mean(1).sum(), leaf)
    got = backward.loss_gradient(head, hidden, tokens)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


def test_hooks_on_the_head_are_kept(tiny):
    """Somebody's own hook on the logits sees them all, as it would without gainlens."""
    tokens = gl.load_tokens("sotu", tiny, n_docs=1, length=100)
    shapes = []

    def look(x, hook):
        shapes.append(tuple(x.shape[:2]))

    tiny.unembed.hook_out.add_hook(look)
    try:
        token_losses(tiny, tokens)
    finally:
        tiny.reset_hooks()
    assert shapes == [(1, 100)]
