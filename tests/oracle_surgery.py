"""The oracle of the report: probe and surgery with nothing but plain run_with_hooks."""

import torch


def plain_surgery(model, calibration, validation, fraction):
    """(intact loss, loss with the quietest pairs by qk zeroed), nats, mean over documents."""
    layers, d = model.cfg.n_layers, model.cfg.d_head
    kv = model.cfg.n_key_value_heads
    key = [f"blocks.{i}.attn.hook_rot_k" for i in range(layers)]
    query = [f"blocks.{i}.attn.hook_rot_q" for i in range(layers)]
    seen = {}
    hooks = [(n, lambda t, hook, n=n: seen.update({n: t.double()})) for n in key + query]
    model.run_with_hooks(calibration, fwd_hooks=hooks)
    cut = []
    for k_name, q_name in zip(key, query, strict=True):
        k = seen[k_name].square().mean((0, 1))
        q = seen[q_name].square().mean((0, 1)).reshape(kv, -1, d).mean(1)
        pair = (q[:, : d // 2] + q[:, d // 2 :]) * (k[:, : d // 2] + k[:, d // 2 :])
        quiet = pair.argsort(1)[:, : round(fraction * d / 2)]
        cut.append(torch.zeros_like(pair).scatter(1, quiet, 1).bool().repeat(1, 2))

    def zero(t, hook, c):
        return t.masked_fill(c, 0.0)

    def loss(fwd_hooks):
        logits = model.run_with_hooks(validation, fwd_hooks=fwd_hooks).double()
        logp = logits[:, :-1].log_softmax(-1)
        return -logp.gather(-1, validation[:, 1:, None])[..., 0].mean(1).mean().item()

    cuts = [(n, lambda t, hook, c=c: zero(t, hook, c)) for n, c in zip(key, cut, strict=True)]
    with torch.inference_mode():
        return loss([]), loss(cuts)
